"""A prompt that several files have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from lightning_mlc.data.uniqueness import UniqueIds
from lightning_mlc.lint.check import Check, LintSettings
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow

LETTERS = 12
"""Fewest letters of a prompt."""


class Overlap(Check):
    """An earlier file has the same prompt, in any language. Case and punctuation do not count.

    Give the training file and the validation file together. A validation prompt that is trained on, even in one
    language, makes figures too good. Threshold: equality of at least 12 letters. About 30 bytes are kept of each text.
    """

    name = "overlap"
    severity = "warning"
    title = "a prompt that another file has, too"

    def __init__(self, files: Sequence[str]) -> None:
        self._names = [Path(file).name for file in files]
        self._seen = UniqueIds()

    @classmethod
    def made(cls, settings: LintSettings) -> Self:
        return cls(settings.files)

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        if len(self._names) < 2:
            return
        for pair in row.pairs:
            if pair.part == "prompt" and pair.text.letters >= LETTERS:
                first = self._seen.row_with(f"{pair.text.language} {pair.text.key}", file)
                if first is not None and first != file:
                    yield self.found(pair, f"also in {self._names[first]}")
