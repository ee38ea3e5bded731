"""Harmful rows that are translated less often than ordinary ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from lightning_mlc.lint.check import Check
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow

DIFFERENCE = 0.1
"""Difference of the shares that is reported."""
DEVIATIONS = 3.0
"""The difference must also be this many standard errors, because few rows differ by chance."""
KINDS = ("harmful", "ordinary")


class Unequal(Check):
    """The share of harmful rows with a translation differs from that of ordinary rows.

    Translators decline harmful prompts. A language in which they are missing learns to answer, and not to refuse. It
    needs the rows' ``kind``, ``harmful`` or ``ordinary``; other rows do not count. Threshold: 10 percentage points and
    three standard errors.
    """

    name = "unequal"
    severity = "warning"
    title = "harmful and ordinary rows unequally translated"

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._texts: Counter[tuple[str, str]] = Counter()

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        if row.kind in KINDS:
            self._rows[row.kind] += 1
            self._texts.update((row.kind, pair.text.language) for pair in row.prompts)
        return iter(())

    def columns(self) -> Iterator[Finding]:
        if any(not self._rows[kind] for kind in KINDS):
            return
        for language in sorted({language for _, language in self._texts}):
            harmful, ordinary = (self._texts[kind, language] / self._rows[kind] for kind in KINDS)
            translated = sum(self._texts[kind, language] for kind in KINDS) / sum(self._rows[kind] for kind in KINDS)
            spread = translated * (1 - translated) * sum(1 / self._rows[kind] for kind in KINDS)
            difference = abs(harmful - ordinary)
            if difference > DIFFERENCE and difference > DEVIATIONS * math.sqrt(spread):
                yield self.found_in_column(
                    language, f"{harmful:.0%} of the harmful rows, {ordinary:.0%} of the ordinary rows"
                )
