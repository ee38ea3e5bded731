"""A column with few texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lightning_mlc.lint.check import Check
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow

SHARE = 0.5
"""Share of the rows that a language should have."""


class FewRows(Check):
    """A language is missing in more than half of the rows.

    It takes part in few steps, so it is learnt less than the others, and figures for it are uncertain. Threshold: half
    of the rows.
    """

    name = "few_rows"
    severity = "warning"
    title = "a language that most rows lack"

    def __init__(self) -> None:
        self._rows = 0
        self._texts: Counter[str] = Counter()

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        self._rows += 1
        self._texts.update(pair.text.language for pair in row.prompts)
        return iter(())

    def columns(self) -> Iterator[Finding]:
        for language, texts in self._texts.items():
            if texts < SHARE * self._rows:
                yield self.found_in_column(language, f"in {texts} of {self._rows} rows")
