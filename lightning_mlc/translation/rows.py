"""The rows of the data: which texts are translated, and how a row is written with its translations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mlc.data.file_layouts import id_of, other_columns, prompts_of_rows, repeated_id, require_source
from lightning_mlc.data.json_writing import json_line
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Message, Place
from lightning_mlc.data.uniqueness import UniqueIds
from lightning_mlc.errors import UserError

PROVENANCE = "translation_provenance"
"""The column that says by language who translated a prompt, and when; or why there is no translation."""
KINDS = ("harmful", "ordinary")
"""The values that ``kind`` may have."""


@dataclass(frozen=True)
class SourceRow:
    """A row of the data.

    Args:
        where: Its place.
        kind: ``harmful``, ``ordinary``, or empty if the row does not say.
        prompts: Conversations by language.
        others: All columns that hold no prompt.
        provenance: Provenance of earlier translations, by language.
    """

    where: Place
    kind: str
    prompts: Mapping[str, Sequence[Message]]
    others: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def turns(self, source: str, system: bool) -> list[str]:
        """The messages in the source language that are translated."""
        return [turn["content"] for turn in self.prompts[source] if _is_translated(turn, system)]

    def translated(self, source: str, system: bool, translations: Sequence[str]) -> list[Message]:
        """The conversation with ``translations`` in place of :meth:`turns`."""
        left = iter(translations)
        return [
            {**turn, "content": next(left)} if _is_translated(turn, system) else dict(turn)
            for turn in self.prompts[source]
        ]

    def as_line(self, prompts: Mapping[str, Sequence[Message] | None], provenance: Mapping[str, Any]) -> bytes:
        """The row in our own layout, as a line of JSON Lines.

        Args:
            prompts: All its prompts; None for a translation that failed.
            provenance: Provenance of the new translations, by language.

        Raises:
            UserError: A column has a value that JSON has no form for.
        """
        row: dict[str, Any] = {"id": self.others["id"]} if "id" in self.others else {}
        row["prompt"] = {code: None if turns is None else _text_of(turns) for code, turns in prompts.items()}
        row |= {key: value for key, value in self.others.items() if key != PROVENANCE}
        row[PROVENANCE] = {**self.provenance, **provenance}
        return json_line(row, self.where)


def _is_translated(turn: Message, system: bool) -> bool:
    return turn["role"] == "user" or (system and turn["role"] == "system")


def _text_of(turns: Sequence[Message]) -> str | list[Message]:
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else [dict(turn) for turn in turns]


def read_source(path: str, source: str) -> Iterator[SourceRow]:
    """Read the rows of the data one by one, in any layout.

    Args:
        path: A file, a saved dataset, ``hf://owner/name`` or ``sample``.
        source: Canonical code of the source language.

    Raises:
        UserError: A row cannot be read, or has no prompt in the source language.
    """
    ids = UniqueIds()
    others = None
    for where, row, prompts in prompts_of_rows(read_rows(path, "file"), source):
        require_source(prompts, where, source, "--source_language")
        if (taken := ids.row_with(own := id_of(row, where), where.number)) is not None:
            raise repeated_id(where, own, Place(where.source, taken))
        others = others or other_columns(row, where)
        provenance = row.get(PROVENANCE)
        if not (provenance is None or isinstance(provenance, Mapping)):
            raise UserError(where, f"has a column '{PROVENANCE}' that this command did not write; rename it")
        known = {code: entry for code, entry in (provenance or {}).items() if entry is not None}
        kind = row.get("kind")
        yield SourceRow(where, kind if kind in KINDS else "", prompts, others(row), known)
