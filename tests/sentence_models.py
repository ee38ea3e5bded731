"""Tiny models of sentence embeddings on disk, in the form of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel

WIDTH, OUT = 64, 24
MODULES = "sentence_transformers.models."


def save_sentence_model(
    folder: Path,
    pooling: dict[str, Any] | None = None,
    dense: bool = False,
    left: bool = False,
    limits: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    kinds: tuple[str, ...] = (),
) -> Path:
    """A random BERT over bytes. Its mean is nearly a bag of bytes, so anagrams are alike.

    Args:
        folder: Where to.
        pooling: Content of the pooling's configuration; the mean by default.
        dense: Whether a layer follows.
        left: Whether padding is on the left.
        limits: Content of ``sentence_bert_config.json``.
        settings: Content of ``config_sentence_transformers.json``.
        kinds: Further modules.
    """
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(None)
    tokenizer.save_pretrained(folder)
    written: dict[str, Any] = {"1_Pooling/config.json": pooling or {"pooling_mode_mean_tokens": True}}
    if left:
        own = json.loads((folder / "tokenizer_config.json").read_text())
        written["tokenizer_config.json"] = {**own, "padding_side": "left"}
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        type_vocab_size=1,
    )
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight *= 0.1
    model.save_pretrained(folder)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if dense:
        modules.append(("Dense", "2_Dense"))
        activation = "torch.nn.modules.activation.Tanh"
        written["2_Dense/config.json"] = {"in_features": WIDTH, "out_features": OUT, "activation_function": activation}
        (folder / "2_Dense").mkdir()
        layer = nn.Linear(WIDTH, OUT)
        weights = {f"linear.{key}": value.detach().contiguous() for key, value in layer.state_dict().items()}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    modules += [("Normalize", "3_Normalize"), *((kind, f"x_{kind}") for kind in kinds)]
    written["modules.json"] = [
        {"idx": number, "name": str(number), "path": path, "type": f"{MODULES}{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    if limits is not None:
        written["sentence_bert_config.json"] = limits
    if settings is not None:
        written["config_sentence_transformers.json"] = settings
    for name, content in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder
