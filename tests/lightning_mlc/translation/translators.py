"""Translators for tests: an endpoint that knows the sample by heart, and tiny translation models on disk."""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoModelForSeq2SeqLM,
    M2M100Config,
    M2M100Tokenizer,
    NllbTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_endpoint import Answer, completion

from lightning_mlc.data.reading import read_rows
from lightning_mlc.translation.languages import NAMES

SAMPLE = [dict(row) for _, row in read_rows("sample", "file")]


def english_rows(count: int, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of the sample with their English prompt alone."""
    chosen = [row for row in SAMPLE if kind in (None, row["kind"])][:count]
    return [{**row, "prompt": {"en": row["prompt"]["en"]}} for row in chosen]


def translate_from_sample(content: str) -> Answer:
    """What an able and willing model replies to a request for a translation of a text of the sample."""
    code = asked_code(content)
    names = {NAMES.get({"zh": "zh-Hans"}.get(code, code), ""): code for code in SAMPLE[0]["prompt"]}
    target = names[re.findall(r"from .+? into (.+?)(?:\.|, whatever)", content)[0]]
    found = next(row["prompt"][target] for row in SAMPLE for text in row["prompt"].values() if holds(content, text))
    return completion(json.dumps({"code": code, "translation": found}, ensure_ascii=False))


def holds(content: str, text: str) -> bool:
    """Whether the request ``content`` is about ``text``, in either wording."""
    return f"\n{text}\n" in content or json.dumps(text, ensure_ascii=False) in content


def asked_code(content: str) -> str:
    """The code that the reply to ``content`` has to repeat."""
    return re.findall(r'"code": "([0-9a-f]{8})"', content)[0]


def is_second(content: str) -> bool:
    """Whether ``content`` is in the words of the second attempt."""
    return content.startswith("You are a translation program.")


def save_nllb(folder: Path) -> Path:
    """A random model of NLLB's architecture with its tokenizer, one token for each letter."""
    letters = sorted({*string.ascii_letters, *string.digits, *"?!.,'▁"})
    vocab = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    tokenizer = NllbTokenizer(vocab=vocab, merges=[])
    tokenizer.save_pretrained(folder)
    save_m2m_model(folder, tokenizer, seed=0, end=3.0)
    return folder


def save_m2m_model(folder: Path, tokenizer: Any, seed: int, end: float) -> None:
    """Random weights for ``tokenizer``. A large spread makes outputs differ from text to text."""
    config = M2M100Config(
        vocab_size=len(tokenizer) + 200,  # that of M2M-100 has room for more, too
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        init_std=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    save_weights(config, folder, tokenizer, seed, end)


def save_m2m(folder: Path) -> Path:
    """A random model of M2M-100's architecture with its tokenizer, which is a SentencePiece model."""
    import sentencepiece

    folder.mkdir(parents=True)
    # Not of all rows: what the random model writes depends on its vocabulary, and should stay when the sample grows.
    text = "\n".join(row["prompt"]["en"] for row in SAMPLE[:65])
    (folder / "text.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=100, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    vocab = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for number in range(3, pieces.get_piece_size()):
        vocab[pieces.id_to_piece(number)] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    tokenizer = M2M100Tokenizer(vocab_file=str(folder / "vocab.json"), spm_file=str(folder / "spm.model"))
    tokenizer.save_pretrained(folder)
    save_m2m_model(folder, tokenizer, seed=7, end=2.0)
    return folder


def save_madlad(folder: Path) -> Path:
    """A random T5 model whose tokenizer has a token for each language, as MADLAD-400's does."""
    letters = sorted({*string.ascii_letters, *string.digits, *"?!.,'▁"})
    tokens = ["<pad>", "</s>", "<unk>", *letters]
    backend = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_tokens([f"<2{code}>" for code in ("en", "sw", "zh", "zh_Hant", "ku", "ckb")])
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        initializer_factor=20.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    save_weights(config, folder, tokenizer, seed=0, end=3.0)
    return folder


def save_weights(config: PreTrainedConfig, folder: Path, tokenizer: Any, seed: int, end: float) -> None:
    """Random weights that prefer letters to other tokens and end some texts, for seeds whose outputs vary."""
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config)
    output = model.get_output_embeddings().weight
    with torch.no_grad():
        for token, number in tokenizer.get_vocab().items():
            if len(token) > 3 and token != tokenizer.eos_token:
                output[number] *= 0.5
        output[tokenizer.eos_token_id] *= end
    model.save_pretrained(folder)
