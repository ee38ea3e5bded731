"""Harmful rows that are translated less often."""

from __future__ import annotations

from translations import found, places, row


def test_a_language_without_the_harmful_rows_is_found() -> None:
    rows = [
        row(n, {"en": "a", "sw": "b", **({} if n % 2 and n < 40 else {"ur": "c"})}, "harmful" if n % 2 else "ordinary")
        for n in range(100)
    ]
    assert [(finding.language, finding.note) for _, finding in found("unequal", rows)] == [
        ("ur", "60% of the harmful rows, 100% of the ordinary rows")
    ]


def test_near_misses() -> None:
    even = [
        row(n, {"en": "a", **({} if n % 4 < 2 else {"ur": "c"})}, "harmful" if n % 2 else "ordinary")
        for n in range(100)
    ]
    assert places("unequal", even) == []
    # Six rows may differ by chance, and rows that do not say their kind do not count.
    few = [row(n, {"en": "a", **({"ur": "c"} if n else {})}, "harmful" if n < 3 else "ordinary") for n in range(6)]
    assert places("unequal", few) == []
    assert places("unequal", [row(n, {"en": "a", **({"ur": "c"} if n % 2 else {})}) for n in range(100)]) == []
