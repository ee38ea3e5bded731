"""Texts much shorter or longer than their column suggests."""

from __future__ import annotations

from translations import found, places, row

SOURCE = "How do I keep my bicycle from rusting in winter? ({})"
URDU = "میں سردیوں میں اپنی سائیکل کو زنگ سے کیسے بچاؤں؟ ({})"
CHINESE = "冬天怎样防止自行车生锈？({})"
ROWS = [row(n, {"en": SOURCE.format(n), "ur": URDU.format(n), "zh": CHINESE.format(n)}) for n in range(1, 31)]


def test_what_is_left_out_or_added_is_found() -> None:
    rows = [
        *ROWS,
        row(31, {"en": SOURCE, "ur": "سائیکل کو زنگ"}),
        row(32, {"en": SOURCE, "zh": CHINESE * 4}),
    ]
    assert places("length", rows) == [(31, "ur"), (32, "zh")]
    assert found("length", rows)[1][1].note.endswith(" times the median length")


def test_near_misses() -> None:
    twice = row(31, {"en": SOURCE, "ur": URDU * 2, "zh": CHINESE[:6]})
    short_source = row(32, {"en": "Why?", "ur": URDU * 5})
    assert places("length", [*ROWS, twice, short_source]) == []


def test_few_rows_make_no_median() -> None:
    assert places("length", [*ROWS[:10], row(31, {"en": SOURCE, "ur": URDU * 9})]) == []
