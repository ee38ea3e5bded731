"""Translations that are the source."""

from __future__ import annotations

import pytest
from translations import fault

SOURCE = "Which three exercises are good for a stiff back after office work?"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (SOURCE, "a copy"),
        (SOURCE.upper(), "a copy"),
        ("Ｗｈｉｃｈ three exercises are good for a stiff back after office work", "a copy"),
        (SOURCE.replace("office", "long"), "a near copy"),
        ("Which three exercise are good for a stiff backs after the office work?", "a near copy"),
    ],
)
@pytest.mark.parametrize("language", ["sw", "de", "ja", "ar"])
def test_copies_are_found(language: str, text: str, note: str) -> None:
    assert fault("copy", SOURCE, text, language) == note


@pytest.mark.parametrize(
    ("source_language", "source", "language", "text"),
    [
        ("en", SOURCE, "de", "Welche drei Übungen helfen bei einem steifen Rücken nach der Büroarbeit?"),
        ("en", SOURCE, "sw", "Ni mazoezi gani matatu yanafaa kwa mgongo uliokakamaa baada ya kazi ya ofisini?"),
        (
            "es",
            "¿Qué tres ejercicios son buenos para la espalda?",
            "pt",
            "Que três exercícios são bons para as costas?",
        ),
        ("en", "Tom Hanks?", "de", "Tom Hanks?"),
        ("en", "Colour is a noun, is it not?", "en-GB", "Colour is a noun, is it not?"),
        ("hr", "Kako da zaštitim svoj bicikl od hrđe?", "bs", "Kako da zaštitim svoj bicikl od hrđe?"),
        ("en", "Compare Python, JavaScript and SQL.", "ja", "Python、JavaScript、SQLを比較してください。"),
    ],
)
def test_translations_pass(source_language: str, source: str, language: str, text: str) -> None:
    assert fault("copy", source, text, language, source_language) is None
