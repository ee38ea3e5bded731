"""Quotes and prefaces around translations."""

from __future__ import annotations

import pytest
from translations import fault

SOURCE = "Where is the station?"


@pytest.mark.parametrize(
    ("language", "text", "note"),
    [
        ("ru", "«Где вокзал?»", "quotes around the text"),
        ("zh", "“车站在哪里？”", "quotes around the text"),
        ("ja", "「駅はどこですか。」", "quotes around the text"),
        ("sw", '"Stesheni iko wapi?"', "quotes around the text"),
        ("sw", "Translation: Stesheni iko wapi?", "a preface"),
        ("sw", "Here is the translation in Swahili:\nStesheni iko wapi?", "a preface"),
        ("sw", "Tafsiri: Stesheni iko wapi?", "a preface"),
        ("zh", "翻译：车站在哪里？", "a preface"),
        ("ru", "**Перевод:** Где вокзал?", "a preface"),
        ("ur", "ترجمہ: اسٹیشن کہاں ہے؟", "a preface"),
    ],
)
def test_they_are_found(language: str, text: str, note: str) -> None:
    assert fault("quotes", SOURCE, text, language) == note


@pytest.mark.parametrize(
    ("source", "language", "text"),
    [
        ('"Where is the station?"', "ru", "«Где вокзал?»"),
        ("Which is right: 'a' or 'b'?", "ru", "«а» или «б»"),
        ("Translate this: good night", "sw", "Tafsiri hii maneno mazuri: usiku mwema"),
        ("Translation: an introduction", "ru", "Перевод: введение"),
        ("Is the translation right?", "ru", "Перевод правильный?"),
    ],
)
def test_near_misses(source: str, language: str, text: str) -> None:
    assert fault("quotes", source, text, language) is None
