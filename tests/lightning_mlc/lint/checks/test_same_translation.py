"""One translation for several sources."""

from __future__ import annotations

from translations import places, row

SWAHILI = "Ninawezaje kufungua mlango uliofungwa?"


def test_it_is_found_in_the_later_row() -> None:
    rows = [
        row(1, {"en": "How do I open a locked door?", "sw": SWAHILI}),
        row(2, {"en": "How do I bake bread?", "sw": SWAHILI.upper()}),
        row(3, {"en": "How do I fly a kite?", "sw": SWAHILI}),
    ]
    assert places("same_translation", rows) == [(2, "sw"), (3, "sw")]


def test_near_misses() -> None:
    rows = [
        row(1, {"en": "How do I open a locked door?", "sw": SWAHILI, "de": "Ja, gern!"}),
        row(2, {"en": "How do I open a locked door", "sw": SWAHILI}),  # the same source
        row(3, {"en": "How do I bake bread?", "ku": SWAHILI, "de": "Ja, gern!"}),  # another language; a short text
    ]
    assert places("same_translation", rows) == []
