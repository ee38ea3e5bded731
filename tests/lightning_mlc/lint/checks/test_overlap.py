"""Prompts that two files have."""

from __future__ import annotations

from translations import found, places, row

ROWS = [
    row(1, {"en": "How do I open a locked door?", "sw": "Ninawezaje kufungua mlango uliofungwa?"}),
    row(1, {"en": "How can I open a locked door?", "sw": "Ninawezaje kufungua mlango uliofungwa"}),
]


def test_a_prompt_of_the_other_file_is_found_in_any_language() -> None:
    assert places("overlap", ROWS, files=[0, 1]) == [(1, "sw")]
    assert found("overlap", ROWS, files=[0, 1])[0][1].note == "also in file0.jsonl"


def test_near_misses() -> None:
    assert places("overlap", ROWS, files=[0, 0]) == []  # one file
    others = [row(1, {"en": "Open a door!", "de": "Na gut"}), row(2, {"en": "Bake a bread!", "de": "Na gut", "sw": ""})]
    assert places("overlap", others, files=[0, 1]) == []
