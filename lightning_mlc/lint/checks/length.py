"""A text much shorter or longer than its column suggests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lightning_mlc.lint.check import Check
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.histograms import RatioHistogram
from lightning_mlc.lint.rows import LintRow, Pair

FACTOR = 3.0
"""A ratio may be up to this many times the column's median, or down to the median divided by it."""
FEWEST = 20
"""Texts of a column that make a median."""
CHARACTERS = 20
"""Fewest characters of a source: lengths of short texts vary."""


class Length(Check):
    """Characters per character of the source, outside a third to three times the median of the column.

    Something was left out or added. The median is that of the column, because scripts differ: Chinese takes 0.30
    characters for an English one, Bengali 1.02, Urdu 1.08. Threshold: a factor of 3; no false alarm on the sample, nor
    on the test set of MLC's authors.
    """

    name = "length"
    severity = "warning"
    title = "much shorter or longer than the column's median"

    def __init__(self) -> None:
        self._ratios: defaultdict[tuple[str, str], RatioHistogram] = defaultdict(RatioHistogram)

    def learn(self, file: int, row: LintRow) -> None:
        for pair in row.pairs[1:]:
            if ratio := _ratio(pair):
                self._ratios[pair.text.language, pair.part].add(ratio)

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        for pair in row.pairs[1:]:
            ratios = self._ratios.get((pair.text.language, pair.part))
            if (ratio := _ratio(pair)) and ratios is not None and ratios.total >= FEWEST:
                relative = ratio / ratios.median()
                if not 1 / FACTOR <= relative <= FACTOR:
                    yield self.found(pair, f"{relative:.2g} times the median length")


def _ratio(pair: Pair) -> float:
    """0: the source is too short, or the text is empty."""
    if len(pair.source.content) < CHARACTERS:
        return 0.0
    return len(pair.text.content) / len(pair.source.content)
