"""Translators for tests: an endpoint that knows the sample by heart, and tiny translation models on disk."""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, M2M100Config, NllbTokenizer

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
    save_m2m_model(folder, tokenizer)
    return folder


def save_m2m_model(folder: Path, tokenizer: Any) -> None:
    """Random weights for ``tokenizer``. A large spread makes outputs differ from text to text."""
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=len(tokenizer),
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
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
