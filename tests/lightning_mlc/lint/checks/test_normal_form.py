"""Unusual encodings of characters."""

from __future__ import annotations

import unicodedata

import pytest
from translations import fault, fault_of_source

FRENCH = "Où est l’école la plus proche ?"


@pytest.mark.parametrize(
    ("language", "text", "note"),
    [
        ("fr", unicodedata.normalize("NFD", FRENCH), "not NFC"),
        ("bn", "আমি পড়\u09df", "not NFC"),
        ("ar", "أين\u200f المحطة؟", "invisible marks of direction"),
        ("ar", "ﺃﻳﻦ ﺍﻟﻤﺤﻄﺔ؟", "Arabic presentation forms"),
        ("zh", "车站\u200b在哪里？", "invisible characters"),
        ("ru", "\ufeffГде вокзал?", "invisible characters"),
    ],
)
def test_they_are_found(language: str, text: str, note: str) -> None:
    assert fault("normal_form", "Where is it?", text, language) == note


@pytest.mark.parametrize(
    ("language", "text"),
    [("fr", FRENCH), ("fa", "نمی\u200cدانم"), ("bn", "র\u200d্যাব কোথায়?"), ("ar", "قال ﷺ ذلك"), ("ja", "ＡＢＣ駅")],
)
def test_usual_characters_pass(language: str, text: str) -> None:
    assert fault("normal_form", "Where is it?", text, language) is None


def test_the_source_is_checked_too() -> None:
    assert fault_of_source("normal_form", "A cafe\u0301") == "not NFC"
