"""One translation for several sources."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_mlc.data.hashing import digest
from lightning_mlc.data.uniqueness import UniqueIds
from lightning_mlc.lint.check import Check
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow

LETTERS = 12
"""Fewest letters: short prompts often have the same translation."""


class SameTranslation(Check):
    """An earlier row has the same translation, and another source. Case and punctuation do not count.

    A translator that answers everything with the same sentence, or a column that slipped, does this. Threshold:
    equality of at least 12 letters. About 30 bytes are kept of each text, not the text.
    """

    name = "same_translation"
    severity = "warning"
    title = "one translation for different sources"

    def __init__(self) -> None:
        self._seen = UniqueIds()

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        source = digest(row.source.key)
        for pair in row.prompts:
            text = pair.text
            if text.letters < LETTERS or text.key == row.source.key:
                continue
            # The "number" of a translation is the hash of its source.
            earlier = self._seen.row_with(f"{text.language} {text.key}", source)
            if earlier is not None and earlier != source:
                yield self.found(pair, "an earlier row has it for another source")
