"""What a check found. Nothing of it is text of the data."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]
"""``error``: the translation is surely wrong. ``warning``: it may be wrong, or it is and does no harm."""
Part = Literal["prompt", "chosen", "rejected"]
"""Which text of a row it is."""


class Finding(NamedTuple):
    """One text, or one column, in which a check found something."""

    check: str
    """Name of the check."""
    severity: Severity
    language: str
    """BCP-47 code of the column."""
    note: str
    """What is wrong, in a few words. Never text of the data."""
    part: Part = "prompt"


class RowFinding(NamedTuple):
    """A finding in a row."""

    file: str
    """Path of the file, as the user gave it."""
    row: int
    """Number of the row, counted from 1."""
    id: str
    """The row's id, or its place."""
    finding: Finding
