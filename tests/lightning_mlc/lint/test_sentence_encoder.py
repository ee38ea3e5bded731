"""Sentence embeddings, compared with plain calculations of one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_models import save_sentence_model
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from lightning_mlc.errors import UserError
from lightning_mlc.lint.sentence_encoder import SentenceEncoder
from lightning_mlc.sources import ModelSource

TEXTS = ["Where is the station?", "Wapi?", "x" * 300, "Как зимой уберечь велосипед от ржавчины?", "half \ud83d"]


def load(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.load(ModelSource(str(folder)), "cpu")


def states(folder: Path, text: str, longest: int = 512) -> Tensor:
    """(T, H), the last states of one text without padding."""
    ids = AutoTokenizer.from_pretrained(folder)(text.encode(errors="replace").decode())["input_ids"][:longest]
    with torch.no_grad():
        found: Tensor = AutoModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0]
    return found


POOLED = {
    "cls": lambda found: found[0],
    "mean": lambda found: found.mean(0),
    "max": lambda found: found.max(0).values,
    "lasttoken": lambda found: found[-1],
}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("mean", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}),
        ("max", {"pooling_mode_max_tokens": True}),
        ("lasttoken", {"pooling_mode_lasttoken": True}),
        ("cls", {"pooling_mode": "cls"}),
    ],
)
def test_padding_does_not_count(tmp_path: Path, left: bool, name: str, config: dict[str, Any]) -> None:
    folder = save_sentence_model(tmp_path / "model", config, left=left)
    assert AutoTokenizer.from_pretrained(folder).padding_side == ("left" if left else "right")
    expected = torch.stack([POOLED[name](states(folder, text)) for text in TEXTS])
    vectors = load(folder).encode(TEXTS)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_dense_layer_follows(tmp_path: Path, pickled: bool) -> None:
    """As LaBSE has it."""
    folder = save_sentence_model(tmp_path / "model", {"pooling_mode_cls_token": True}, dense=True)
    file = folder / "2_Dense" / "model.safetensors"
    weights = load_file(file)
    if pickled:
        torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
        file.unlink()
    expected = [
        torch.tanh(weights["linear.weight"] @ states(folder, text)[0] + weights["linear.bias"]) for text in TEXTS
    ]
    vectors = load(folder).encode(TEXTS)
    torch.testing.assert_close(
        vectors, torch.nn.functional.normalize(torch.stack(expected), dim=1), rtol=1e-4, atol=1e-5
    )


def test_long_texts_are_cut_where_the_model_says(tmp_path: Path) -> None:
    folder = save_sentence_model(tmp_path / "model", limits={"max_seq_length": 16, "do_lower_case": False})
    vectors = load(folder).encode(["a" * 16 + "b" * 50, "a" * 16])
    torch.testing.assert_close(vectors[0], vectors[1])


def test_the_models_own_prefix_is_used(tmp_path: Path) -> None:
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    with_prefix = load(save_sentence_model(tmp_path / "a", settings=settings)).encode(["Where?"])
    plain = load(save_sentence_model(tmp_path / "b", settings={"prompts": {"query": "query: "}}))
    torch.testing.assert_close(with_prefix, plain.encode(["query: Where?"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "pools by pooling_mode_weightedmean_tokens"),
        ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "pools by cls and mean"),
        ({"pooling": {"pooling_mode_cls_token": False}}, "pools by nothing that is known"),
        ({"kinds": ("CNN",)}, "has a step 'CNN' that is not supported"),
        ({"limits": {"do_lower_case": True}}, "lowers texts"),
    ],
)
def test_what_would_give_other_vectors_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as told:
        load(save_sentence_model(tmp_path / "model", **options))
    assert said in str(told.value)


def test_other_models_are_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read modules.json of .*LaBSE"):
        load(tiny_model)


def test_a_missing_tokenizer_is_no_empty_one(tmp_path: Path) -> None:
    folder = save_sentence_model(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"lacks its tokenizer: the one that was found has \d+ tokens"):
        load(folder)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = save_sentence_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights, such as encoder\.layer\.0\.output\.dense\.weight"):
        load(folder)
