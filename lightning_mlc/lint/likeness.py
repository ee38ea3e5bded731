"""Checks that a model makes: it scores how alike a translation and its source are.

Scores of different models and languages are not comparable, and no fixed threshold suits them all: cosines of one model
are between 0 and 1, those of another between 0.7 and 1. So each column is its own measure. Every text is scored twice,
with its own source and with that of another row. The median of the first scores is what a good translation has, the
median of the second ones what an unrelated text has, and the limit is a point between the two.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from math import isnan, nan
from statistics import median
from typing import ClassVar

from lightning_mlc.errors import UserError
from lightning_mlc.lint.check import Check
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow, Pair
from lightning_mlc.lint.texts import Text

BLOCK = 256
"""Number of translations that are given to the model together."""
FEWEST = 20
"""Scores of a column that make a median."""
TELLS = 0.9
"""Share of a column's texts that must be more like their own source than like another one. Otherwise the model does not
know the language, or the column is wrong as a whole; and scores of single texts mean nothing."""
LOST = 0.1
"""Share of a column's texts without a score that is reported."""


class LikenessCheck(Check):
    """A translation is less like its source than others of its column are. See the module for the limit.

    A text is scored in the first reading, in blocks. A score takes 8 bytes of memory.
    """

    limit: ClassVar[float]
    """Where the limit is: 0 at the median of unrelated texts, 1 at the median of translations."""
    unit: ClassVar[str]
    """Name of the score."""
    doubt: ClassVar[str] = "is the language known to the model?"
    """What to ask about a column whose texts the scores do not tell from unrelated ones."""

    def __init__(self) -> None:
        self._columns: defaultdict[tuple[str, str], _Column] = defaultdict(_Column)
        self._waiting: list[tuple[_Column, Pair, Text | None]] = []

    @abstractmethod
    def scores(self, pairs: Sequence[tuple[Text, Text]]) -> Sequence[float | None]:
        """Score pairs of a source and a text: the larger, the more alike. None: there is no score.

        Raises:
            UserError: The model cannot be run.
        """

    def learn(self, file: int, row: LintRow) -> None:
        for pair in row.pairs[1:]:
            column = self._columns[pair.text.language, pair.part]
            self._waiting.append((column, pair, column.other_than(pair.source)))
            if len(self._waiting) == BLOCK:
                self._score()

    def _score(self) -> None:
        pairs = [(pair.source, pair.text) for _, pair, _ in self._waiting]
        pairs += [(other, pair.text) for _, pair, other in self._waiting if other is not None]
        found = [nan if score is None else score for score in self.scores(pairs)] if pairs else []
        others = iter(found[len(self._waiting) :])
        for (column, _, other), own in zip(self._waiting, found, strict=False):
            column.own.append(own)
            if other is not None:
                column.others.append(next(others))
                column.nearer.append(own > column.others[-1] if not isnan(own) else -1)
        self._waiting.clear()

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        self._score()
        for pair in row.pairs[1:]:
            column = self._columns[pair.text.language, pair.part]
            score = column.next(row.where)
            if not isnan(score) and column.tells and score < column.between(self.limit):
                yield self.found(pair, f"{self.unit} {score:.2g}, {column.usual:.2g} is the column's median")

    def columns(self) -> Iterator[Finding]:
        for (language, part), column in self._columns.items():
            what = "" if part == "prompt" else f" ({part})"
            if column.is_large and not column.tells:
                note = f"only {column.share_nearer:.0%} of the texts{what} score higher with their own source"
                yield self.found_in_column(language, f"{note} than with another: {self.doubt}")
            if (lost := sum(map(isnan, column.own))) > LOST * len(column.own):
                yield self.found_in_column(language, f"{lost} of {len(column.own)} texts{what} have no {self.unit}")


class _Column:
    """Scores of the texts in one language."""

    def __init__(self) -> None:
        self.own = array("d")
        """With their own source; NaN where there is no score."""
        self.others = array("d")
        """With another source."""
        self.nearer = array("b")
        """Whether the first is larger than the second, 1 or 0; -1 where there is no score."""
        self._last: tuple[str, Text] | None = None
        self._taken = 0

    def other_than(self, source: Text) -> Text | None:
        """The source of an earlier row, if it differs from ``source``, which is the next row's."""
        other = None if self._last is None or self._last[0] == source.key else self._last[1]
        self._last = source.key, Text(source.content, source.language)  # without the features that checks computed
        return other

    def next(self, where: str) -> float:
        """The score of the next text with its own source."""
        if self._taken == len(self.own):
            raise UserError(where, "was not there a moment ago; leave the file alone until lint is done")
        self._taken += 1
        return self.own[self._taken - 1]

    @cached_property
    def is_large(self) -> bool:
        """Whether there are enough scores."""
        return sum(self.nearer[place] >= 0 for place in range(len(self.nearer))) >= FEWEST

    @cached_property
    def share_nearer(self) -> float:
        """Share of the texts that are more like their own source."""
        known = [value for value in self.nearer if value >= 0]
        return sum(known) / len(known)

    @cached_property
    def tells(self) -> bool:
        """Whether scores tell a translation from an unrelated text."""
        return self.is_large and self.share_nearer >= TELLS

    @cached_property
    def usual(self) -> float:
        """The median of translations."""
        return median(score for score in self.own if not isnan(score))

    @cached_property
    def _unrelated(self) -> float:
        return median(score for score in self.others if not isnan(score))

    def between(self, place: float) -> float:
        """The score at ``place``: 0 is that of unrelated texts, 1 that of translations."""
        return self._unrelated + place * (self.usual - self._unrelated)
