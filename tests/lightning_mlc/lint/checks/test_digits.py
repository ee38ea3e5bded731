"""Numbers that are lost or invented."""

from __future__ import annotations

import pytest
from translations import fault


@pytest.mark.parametrize(
    ("source", "language", "text", "note"),
    [
        ("Add 250 grams.", "sw", "Ongeza gramu.", "digits lost"),
        ("Add 250 grams.", "bn", "২৫ গ্রাম যোগ করুন।", "digits lost"),
        ("Born in 1987.", "ar", "ولد عام ١٩٨٩.", "digits lost"),
        ("Add 25 grams.", "ru", "Добавьте 25 граммов за 25 минут.", "digits invented"),
        ("Add some.", "ru", "Добавьте 25 граммов.", "digits invented"),
    ],
)
def test_differences_are_found(source: str, language: str, text: str, note: str) -> None:
    assert fault("digits", source, text, language) == note


@pytest.mark.parametrize(
    ("source", "language", "text"),
    [
        ("Add 250 grams.", "bn", "২৫০ গ্রাম যোগ করুন।"),
        ("It costs 1,000.50.", "ar", "يكلف ١٠٠٠٫٥٠."),
        ("From 3 to 5.", "ur", "5 تک 3 سے۔"),
        ("Three or four exercises", "ru", "3 или 4 упражнения"),
        ("Wait 10 minutes.", "zh", "等十分钟。"),
        ("See https://example.org/2024", "sw", "Angalia tovuti"),
    ],
)
def test_equal_numbers_pass(source: str, language: str, text: str) -> None:
    assert fault("digits", source, text, language) is None
