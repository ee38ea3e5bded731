"""Divide rows into those for training and those for measuring. No prompt is in both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.grid import DataSettings
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import digest
from lightning_mlc.files.atomic import write_whole


@dataclass(frozen=True)
class HeldOutSplit:
    """The files that a study reads."""

    train: Path
    heldout: Path
    rows: dict[str, int]
    """Number of rows: ``train``, ``heldout`` and ``too long``, which are in neither file."""
    digest: str
    """Digest of all rows in both files."""


def split_rows(
    data: str, settings: DataSettings, source_language: str, chat: ChatTokenizer, folder: Path
) -> HeldOutSplit:
    """Write the preference rows of ``data`` into ``train.jsonl`` and ``heldout.jsonl`` in ``folder``.

    Rows are held out in the order of a digest of their prompt in the source language. So the split depends only on
    the rows, not on their order, and rows with the same prompt are in the same file.

    Raises:
        UserError: A row lacks a response, there are too few rows, or ``folder`` already has other rows.
    """
    raw = list(read_rows(data, "--data"))
    examples = list(parse_rows(raw, source_language))
    groups: dict[str, list[dict[str, Any]]] = {}
    long = 0
    for (_, row), example in zip(raw, examples, strict=True):
        if example.chosen is None or example.rejected is None:
            raise UserError(example.where, "a study measures preference rows, with 'chosen' and 'rejected'")
        source = example.prompts[source_language]
        prompt = max(len(chat.prompt(messages, example.where)[0]) for messages in example.prompts.values())
        response = max(len(chat.response(source, text)) for text in (example.chosen, example.rejected))
        if prompt > (settings.max_prompt_tokens or prompt) or response > (settings.max_response_tokens or response):
            long += 1
            continue
        key = digest(source)
        same = groups.setdefault(key, [])
        same.append({**row, "id": f"{key}-{len(same)}"})
    heldout: list[dict[str, Any]] = []
    train: list[dict[str, Any]] = []
    for _, group in sorted(groups.items()):
        (heldout if len(heldout) < settings.heldout else train).extend(group)
    if not train or len(heldout) < settings.heldout:
        raise UserError(
            "data.heldout",
            f"{settings.heldout} of {len(heldout) + len(train)} rows leave none to train on"
            + (f" ({long} rows are longer than data.max_..._tokens)" if long else ""),
        )
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        folder / f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in (("train", train), ("heldout", heldout))
    }
    for path, text in texts.items():  # other processes may be training on these files
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError("--data", f"{path} has other rows; give another --out, or the data of that run")
    for path, text in texts.items():
        write_whole(path, text)
    counts = {"train": len(train), "heldout": len(heldout), "too long": long}
    return HeldOutSplit(folder / "train.jsonl", folder / "heldout.jsonl", counts, digest(train, heldout))
