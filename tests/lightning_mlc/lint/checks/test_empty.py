"""Texts with nothing in them."""

from __future__ import annotations

import pytest
from translations import fault, fault_of_source


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("?", "fewer than two letters"),
        ("。。。", "fewer than two letters"),
        ("ক", "fewer than two letters"),
    ],
)
def test_texts_without_content_are_found(text: str, note: str) -> None:
    assert fault("empty", "Where is the station?", text, "bn") == note


@pytest.mark.parametrize(
    ("source", "text", "language"),
    [("Yes?", "はい", "ja"), ("OK", "好的", "zh"), ("42", "٤٢", "ar"), ("🙂", "🙂", "sw"), ("?", "؟", "ur")],
)
def test_short_texts_pass(source: str, text: str, language: str) -> None:
    assert fault("empty", source, text, language) is None


def test_a_source_is_empty_only_without_any_character() -> None:
    assert fault_of_source("empty", "  ") == "empty"
    assert fault_of_source("empty", "?") is None
