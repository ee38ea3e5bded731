"""Texts that were decoded with the wrong encoding."""

from __future__ import annotations

import pytest
from translations import fault

TEXTS = {
    "ru": "Как зимой уберечь велосипед от ржавчины?",
    "fr": "Où est la gare la plus proche, s’il vous plaît ?",
    "ar": "أين تقع أقرب محطة من فضلك؟",
    "bn": "নিকটতম স্টেশন কোথায়?",
    "ja": "一番近い駅はどこですか？",
    "vi": "Ga gần nhất ở đâu vậy?",
}


@pytest.mark.parametrize("language", TEXTS)
def test_utf8_read_as_latin_1_is_found(language: str) -> None:
    wrong = TEXTS[language].encode().decode("latin-1")
    assert fault("mojibake", "Where is the nearest station?", wrong, language) == "a wrong encoding"


def test_utf8_read_as_windows_1251_is_found() -> None:
    wrong = TEXTS["ru"].replace("и", "ы").encode().decode("cp1251", errors="replace").replace("\ufffd", "")
    assert fault("mojibake", "Where is the nearest station?", wrong, "ru") == "a wrong encoding"


@pytest.mark.parametrize("language", TEXTS)
def test_right_texts_pass(language: str) -> None:
    assert fault("mojibake", "Where is the nearest station?", TEXTS[language], language) is None


def test_unusual_letters_pass() -> None:
    assert fault("mojibake", "The Å ngström unit", "L’unité Ångström « Å », naïve à la façon", "fr") is None
