"""Columns with few texts."""

from __future__ import annotations

from translations import found, row


def test_a_language_that_most_rows_lack_is_found() -> None:
    rows = [
        row(n, {"en": "a", "sw": "b", **({"ur": "c"} if n < 5 else {}), **({"ku": "d"} if n < 6 else {})})
        for n in range(1, 11)
    ]
    assert [(number, finding.language, finding.note) for number, finding in found("few_rows", rows)] == [
        (0, "ur", "in 4 of 10 rows")
    ]
