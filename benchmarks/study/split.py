"""Divide rows into those for training and those for measuring. No prompt is in both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.grid import DataSettings
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import digest
from lightning_mlc.evaluation.systems.generation import Conversation
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
    data: str,
    settings: DataSettings,
    source_language: str,
    chat: ChatTokenizer,
    folder: Path,
    ordinary: Sequence[Conversation] = (),
) -> HeldOutSplit:
    """Write preference rows into ``train.jsonl`` and ``heldout.jsonl`` in ``folder``.

    Rows are held out in the order of a digest of their prompt in the source language. So the split depends only on
    the rows, not on their order, and rows with the same prompt are in the same file.

    Args:
        data: Rows to train on, and to measure unless ``settings.heldout_from`` has those.
        settings: Which rows to use.
        source_language: Language of the responses.
        chat: Tokenizer of the model. It measures the lengths.
        folder: Where the files are written.
        ordinary: Prompts in the source language that are measured apart, so that they are not trained on either.

    Raises:
        UserError: A row lacks a response, there are too few rows, or ``folder`` already has other rows.
    """
    groups, long = _by_prompt(data, "--data", settings, source_language, chat)
    sources = groups
    if settings.heldout_from is not None:
        sources, _ = _by_prompt(settings.heldout_from, "data.heldout_from", settings, source_language, chat, True)
    heldout: list[dict[str, Any]] = []
    measured = set()
    for key, group in sorted(sources.items()):
        if len(heldout) < settings.heldout:
            heldout.extend(group)
            measured.add(key)
    measured |= {digest(prompt) for prompt in ordinary}
    train = [row for key, group in sorted(groups.items()) if key not in measured for row in group]
    if settings.heldout_from is not None and len(heldout) < settings.heldout:
        raise UserError(
            "data.heldout", f"is {settings.heldout}, but data.heldout_from has {len(heldout)} harmful rows that fit"
        )
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


def _by_prompt(
    path: str,
    option: str,
    settings: DataSettings,
    source_language: str,
    chat: ChatTokenizer,
    harmful_only: bool = False,
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Return the rows in ``path`` by the digest of their prompt, and the number of those that are too long.

    ``harmful_only`` leaves ordinary rows out. A row that does not say what kind it is counts as harmful.
    """
    raw = list(read_rows(path, option))
    groups: dict[str, list[dict[str, Any]]] = {}
    long = 0
    for (_, row), example in zip(raw, parse_rows(raw, source_language), strict=True):
        if harmful_only and example.ordinary:
            continue
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
    return groups, long
