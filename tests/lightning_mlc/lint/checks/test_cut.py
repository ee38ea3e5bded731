"""Texts that end in the middle."""

from __future__ import annotations

from translations import places, row

ROWS = [
    row(n, {"en": f"Explain rule {n}.", "bn": f"নিয়ম {n} ব্যাখ্যা করুন।", "zh": f"解释规则{n}。", "th": f"อธิบายกฎ {n}"})
    for n in range(1, 31)
]


def test_a_text_without_an_end_is_found() -> None:
    rows = [*ROWS, row(31, {"en": "Explain the law.", "bn": "আইন ব্যাখ্যা", "zh": "解释法律"})]
    assert places("cut", rows) == [(31, "bn"), (31, "zh")]


def test_near_misses() -> None:
    rows = [
        *ROWS,
        row(31, {"en": "Explain the law", "bn": "আইন ব্যাখ্যা"}),
        row(32, {"en": "Explain the law.", "bn": "আইন ব্যাখ্যা করুন।”)", "zh": "“解释法律！”", "th": "อธิบายกฎหมาย"}),
    ]
    assert places("cut", rows) == []
    assert places("cut", [*ROWS[:9], row(31, {"en": "Explain the law.", "bn": "আইন ব্যাখ্যা"})]) == []
