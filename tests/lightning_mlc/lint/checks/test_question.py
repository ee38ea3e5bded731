"""Questions that became statements."""

from __future__ import annotations

from translations import places, row

ROWS = [
    row(
        n,
        {"en": f"Where is street {n}?", "ar": f"أين شارع {n}؟", "ja": f"{n}番通りはどこですか。", "th": f"ถนน {n} อยู่ที่"},
    )
    for n in range(1, 31)
]


def test_a_statement_is_found() -> None:
    rows = [*ROWS, row(31, {"en": "Where is the sea?", "ar": "البحر هناك.", "ja": "海は遠い。"})]
    assert places("question", rows) == [(31, "ar"), (31, "ja")]


def test_near_misses() -> None:
    # A question mark anywhere, a particle, a source that is no question, and a language that does without.
    rows = [
        *ROWS,
        row(31, {"en": "Where is the sea?", "ar": "أين البحر؟ شكرا", "ja": "海はどこですか", "th": "ทะเลอยู่ที่"}),
        row(32, {"en": "Show me the sea.", "ar": "أرني البحر."}),
    ]
    assert places("question", rows) == []
    assert places("question", [*ROWS[:9], row(31, {"en": "Where is the sea?", "ar": "البحر هناك."})]) == []
