"""An example as every layout is turned into it: texts, before tokenisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, str]
"""``{"role": ..., "content": ...}``."""

Row = Mapping[str, Any]
"""A row as a file has it."""

PAIR = ("chosen", "rejected")
"""Keys of two responses."""
RESPONSES = ("response", "output", "completion")
"""Keys of a single response, in the order in which they are looked for."""


class Place(str):
    """Where a row stands, for messages: ``train.jsonl row 7``.

    Args:
        source: Name of the file or data set.
        number: The row's number, counted from 1.
    """

    source: str
    number: int

    def __new__(cls, source: str, number: int) -> Place:
        place = super().__new__(cls, f"{source} row {number}")
        place.source, place.number = source, number
        return place

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]  # for copies
        return self.source, self.number


DataKind = Literal["pairs", "unpaired", "single"]
"""Two responses to each prompt, or one that is labelled as desirable or not, or one without a label."""
KIND_NAMES: dict[DataKind, str] = {
    "pairs": "a chosen and a rejected response",
    "unpaired": "a response with a label",
    "single": "a response without a label",
}
"""What an example of each kind has, for messages."""


@dataclass(frozen=True)
class Example:
    """A prompt in one or more languages, and one or two responses: in the source language at least."""

    id: str
    where: str
    """File and row, for messages: ``train.jsonl row 7``."""
    prompts: dict[str, list[Message]]
    """Conversation up to and including the user's last message, by language."""
    chosen: str | None
    """The preferred or desirable response, or the only one."""
    rejected: str | None
    """The dispreferred or undesirable response."""
    labelled: bool = False
    """Whether a single response was labelled as desirable or not."""
    translated: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Chosen and rejected response by language, in those other languages that have their own."""

    @property
    def kind(self) -> DataKind:
        """What responses it has."""
        return "pairs" if len(self.responses) == 2 else "unpaired" if self.labelled else "single"

    @property
    def responses(self) -> tuple[str, ...]:
        """The responses that are there."""
        return tuple(response for response in (self.chosen, self.rejected) if response is not None)
