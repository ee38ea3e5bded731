"""Sets of prompts to evaluate a model on: rows as any layout of :mod:`lightning_mlc.data` has them.

Responses are optional here. A set is harmful (a safe model declines) or ordinary (a useful model answers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_mlc.data.file_layouts import id_of, pair_of, prompts_of_rows, repeated_id
from lightning_mlc.data.languages import canonical_language, canonical_languages
from lightning_mlc.data.reading import HUB, read_rows
from lightning_mlc.data.records import Message, Place
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import Key

Kind = Literal["harmful", "ordinary"]
HARMFUL: Kind = "harmful"
ORDINARY: Kind = "ordinary"


@dataclass(frozen=True)
class EvaluationRow:
    """A prompt in one or more languages, and maybe a pair of responses in the source language."""

    id: str
    where: str
    prompts: dict[str, list[Message]]
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Rows of one file and one kind."""

    name: str
    kind: Kind
    rows: tuple[EvaluationRow, ...]

    def languages(self) -> tuple[str, ...]:
        """All languages of the rows, in the order of their first appearance."""
        return tuple(dict.fromkeys(language for row in self.rows for language in row.prompts))


def conversations(sets: Sequence[PromptSet], languages: Sequence[str]) -> Iterator[tuple[Key, list[Message]]]:
    """Every prompt of ``sets`` in each of ``languages`` that it has."""
    for part in sets:
        for row in part.rows:
            for language in languages:
                if language in row.prompts:
                    yield Key(part.name, row.id, language), row.prompts[language]


def read_prompt_sets(
    harmful: Sequence[str], ordinary: Sequence[str], source_language: str, limit: int | None = None
) -> list[PromptSet]:
    """The sets in the files ``harmful`` and ``ordinary``, each named after its file.

    A row with a ``kind`` of its own, ``harmful`` or ``ordinary``, goes by that; a file that has both kinds gives
    two sets.

    Args:
        harmful: Files, saved datasets, ``hf://`` datasets or ``sample``.
        ordinary: The same, of prompts that a model should not decline.
        source_language: Language of a prompt whose column does not say.
        limit: How many rows of each set to take at most.

    Raises:
        UserError: A source or a row of it cannot be used.
    """
    source = canonical_language(source_language, "source_language")
    sets: list[PromptSet] = []
    for option, paths, kind in (("prompts", harmful, HARMFUL), ("ordinary", ordinary, ORDINARY)):
        for path in paths:
            name = _stem(path)
            by_kind = _rows_by_kind(path, option, kind, source)
            for index, (of_kind, rows) in enumerate(by_kind.items()):
                suffix = "" if index == 0 else f"-{of_kind}"
                own = _free(name + suffix, {part.name for part in sets})
                sets.append(PromptSet(own, of_kind, tuple(rows[:limit])))
    return sets


def choose_languages(sets: Sequence[PromptSet], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The languages to evaluate: those ``asked`` for, or all that ``sets`` have.

    Raises:
        UserError: One is no language, or no set has it.
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
    if not rows:
        raise UserError(option, f"{path} has no rows")
    return rows


def _kind_of(row: Mapping[str, Any], otherwise: Kind, where: str) -> Kind:
    own = row.get("kind")
    if own is None:
        return otherwise
    if own not in (HARMFUL, ORDINARY):
        raise UserError(where, f"kind must be {HARMFUL} or {ORDINARY}, or not there, got {own!r}")
    return HARMFUL if own == HARMFUL else ORDINARY


def _stem(path: str) -> str:
    stem = path.removeprefix(HUB).split("?")[0].strip("/") if path.startswith(HUB) else Path(path).stem
    return re.sub(r"[^\w. -]", "-", stem.replace("/", "_"))  # a name goes into reports, as it is


def _free(stem: str, taken: set[str]) -> str:
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name
