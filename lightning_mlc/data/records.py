"""An example before tokenisation: texts, the same for every file layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, str]
"""``{"role": ..., "content": ...}``."""

Row = Mapping[str, Any]
"""A row of a file."""

PAIR = ("chosen", "rejected")
"""Keys of two responses."""
RESPONSES = ("response", "output", "completion")
"""Keys of a single response, in the order of the search."""


class Place(str):
    """File and row number, for messages: ``train.jsonl row 7``.

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
"""The responses of an example: a pair, one with a label (desirable or not), or one without a label."""
KIND_NAMES: dict[DataKind, str] = {
    "pairs": "a chosen and a rejected response",
    "unpaired": "a response with a label",
    "single": "a response without a label",
}
"""The responses of each kind, in words for messages."""


@dataclass(frozen=True)
class Example:
    """A prompt in one or more languages, with one or two responses, at least in the source language."""

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
    """Chosen and rejected response by language, for the other languages that have responses of their own."""
    ordinary: bool = False
    """Whether a model should answer the prompt. Otherwise it is harmful, or nothing is said of it."""

    @property
    def kind(self) -> DataKind:
        """Kind of its responses."""
        return "pairs" if len(self.responses) == 2 else "unpaired" if self.labelled else "single"

    @property
    def responses(self) -> tuple[str, ...]:
        """The one or two responses."""
        return tuple(response for response in (self.chosen, self.rejected) if response is not None)
