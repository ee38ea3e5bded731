"""Sets of prompts to evaluate a model on. Their rows have one of the layouts that :mod:`lightning_mlc.data` reads.

Responses are optional here. A set is harmful (a safe model declines its prompts) or ordinary (a useful model answers
them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mlc.data.file_layouts import id_of, pair_of, prompts_of_rows, repeated_id
from lightning_mlc.data.kinds import HARMFUL, ORDINARY, Kind, kind_of
from lightning_mlc.data.languages import canonical_language, canonical_languages
from lightning_mlc.data.reading import HUB, read_rows
from lightning_mlc.data.records import Message, Place
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import Key


@dataclass(frozen=True)
class EvaluationRow:
    """A prompt in one or more languages, with or without a pair of responses in the source language."""

    id: str
    where: str
    """File and row, for messages."""
    prompts: dict[str, list[Message]]
    """Messages by language."""
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The rows of one kind in one file."""

    name: str
    kind: Kind
    rows: tuple[EvaluationRow, ...]

    def languages(self) -> tuple[str, ...]:
        """All languages of the rows, in the order of their first appearance."""
        return tuple(dict.fromkeys(language for row in self.rows for language in row.prompts))


def conversations(sets: Sequence[PromptSet], languages: Sequence[str]) -> Iterator[tuple[Key, list[Message]]]:
    """Every prompt of ``sets``, in each of ``languages`` that it exists in."""
    for part in sets:
        for row in part.rows:
            for language in languages:
                if language in row.prompts:
                    yield Key(part.name, row.id, language), row.prompts[language]


def read_prompt_sets(
    harmful: Sequence[str], ordinary: Sequence[str], source_language: str, limit: int | None = None
) -> list[PromptSet]:
    """Read the sets in the files ``harmful`` and ``ordinary``. Each set is named after its file.

    A row can have its own ``kind``, ``harmful`` or ``ordinary``, which takes precedence. A file with rows of both kinds
    gives two sets.

    Args:
        harmful: Files, saved datasets, ``hf://`` datasets or ``sample``.
        ordinary: The same, with prompts that a model should not decline.
        source_language: Language of a prompt whose column does not name one.
        limit: Maximum number of rows per set; None for all.

    Raises:
        UserError: A source or one of its rows cannot be used.
    """
    source = canonical_language(source_language, "source_language")
    sets: list[PromptSet] = []
    for option, paths, kind in (("prompts", harmful, HARMFUL), ("ordinary", ordinary, ORDINARY)):
        for path in paths:
            name = _name_of(path)
            by_kind = _rows_by_kind(path, option, kind, source)
            for index, (of_kind, rows) in enumerate(by_kind.items()):
                suffix = "" if index == 0 else f"-{of_kind}"
                own = _unused(name + suffix, {part.name for part in sets})
                sets.append(PromptSet(own, of_kind, tuple(rows[:limit])))
    return sets


def choose_languages(sets: Sequence[PromptSet], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The languages to evaluate: those in ``asked``, or all languages of ``sets``.

    Raises:
        UserError: A code is not a language, or no prompt has that language.
    """
    found = tuple(dict.fromkeys(language for part in sets for language in part.languages()))
    if asked is None:
        return found
    for language in (languages := canonical_languages(asked, "languages")):
        if language not in found:
            raise UserError("languages", f"no prompt is in '{language}' (found: {', '.join(found)})")
    return languages


def _rows_by_kind(path: str, option: str, kind: Kind, source: str) -> dict[Kind, list[EvaluationRow]]:
    rows: dict[Kind, list[EvaluationRow]] = {}
    seen: dict[str, Place] = {}
    for where, row, prompts in prompts_of_rows(read_rows(path, option), source):
        if not prompts:
            raise UserError(where, "has no prompt in any language; remove the row")
        identity = id_of(row, where)
        if identity in seen:
            raise repeated_id(where, identity, seen[identity])
        seen[identity] = where
        chosen, rejected = None, None
        if row.get("chosen") is not None and row.get("rejected") is not None:
            chosen, rejected, _ = pair_of(row, prompts, where, source)
        rows.setdefault(_kind_of(row, kind, where), []).append(
            EvaluationRow(identity, where, prompts, chosen, rejected)
        )
    return rows


def _kind_of(row: Mapping[str, Any], otherwise: Kind, where: str) -> Kind:
    return kind_of(row, where) or otherwise


def _name_of(path: str) -> str:
    stem = path.removeprefix(HUB).split("?")[0].strip("/") if path.startswith(HUB) else Path(path).stem
    return re.sub(r"[^\w. -]", "-", stem.replace("/", "_"))  # reports show the name unchanged


def _unused(stem: str, taken: set[str]) -> str:
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name
