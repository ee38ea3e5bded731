"""Stretches that were left as they are."""

from __future__ import annotations

import pytest
from translations import fault

SOURCE = "Write a letter to the landlord about the broken heating in my flat."


@pytest.mark.parametrize(
    ("language", "text", "note"),
    [
        ("ru", "Напишите письмо хозяину квартиры about the broken heating", "of the letters are of another script"),
        (
            "bn",
            "বাড়িওয়ালাকে একটি চিঠি লিখুন about the broken heating",
            "of the letters are of another script",
        ),
        ("sw", "Andika barua kwa mwenye nyumba about the broken heating in my nyumba.", "a run of the source's words"),
        ("bn", "বাড়িওয়ালাকে একটি চিঠি লিখুন о сломанном отоплении", "of the letters are of another script"),
    ],
)
def test_they_are_found(language: str, text: str, note: str) -> None:
    assert (fault("untranslated", SOURCE, text, language) or "").endswith(note)


@pytest.mark.parametrize(
    ("source", "language", "text"),
    [
        (SOURCE, "ru", "Напишите письмо хозяину квартиры о сломанном отоплении от Anna Smith."),
        (SOURCE, "sw", "Andika barua kwa mwenye nyumba kuhusu the broken heating ya nyumba yangu."),
        (SOURCE, "ru", "Запустите `pip install lightning-mlc` и откройте https://example.org/documentation"),
        ("Compare JavaScript and Python for me.", "zh", "请为我比较一下JavaScript和Python。"),
        (SOURCE, "sw", SOURCE),  # which is a copy
        (SOURCE, "ru", SOURCE),
    ],
)
def test_near_misses(source: str, language: str, text: str) -> None:
    assert fault("untranslated", source, text, language) is None
