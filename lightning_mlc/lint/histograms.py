"""Counts by column, from which medians and shares come. Their memory does not grow with the number of rows."""

from __future__ import annotations

import math
from collections import Counter

BINS_PER_OCTAVE = 16
"""Bins between a ratio and its double, so a median is exact within 4.5 %."""


class RatioHistogram:
    """How often each ratio occurs, rounded to one of 16 values per factor of two."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, ratio: float) -> None:
        """Count one more ratio, which is above zero."""
        self._counts[round(math.log2(ratio) * BINS_PER_OCTAVE)] += 1

    @property
    def total(self) -> int:
        """Number of ratios."""
        return self._counts.total()

    def median(self) -> float:
        """The median; there must be a ratio."""
        seen, half = 0, self.total / 2
        for place in sorted(self._counts):
            seen += self._counts[place]
            if seen >= half:
                return float(2 ** (place / BINS_PER_OCTAVE))
        raise ValueError("there is no ratio")


class Share:
    """How many of some texts have a feature."""

    def __init__(self) -> None:
        self.having = 0
        self.total = 0

    def add(self, has: bool) -> None:
        """Count one more text."""
        self.having += has
        self.total += 1

    @property
    def value(self) -> float:
        """From 0 to 1; 0 without texts."""
        return self.having / self.total if self.total else 0.0
