"""Characters that no text should have."""

from __future__ import annotations

import pytest
from translations import fault, fault_of_source


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("Где нах\ufffdдится вокзал?", "replacement character"),
        ("Где вокзал \ud83d?", "unpaired surrogate"),
        ("Где\x00 вокзал?", "control character"),
        ("Где\x85 вокзал?", "control character"),
        ("Где вокзал \uf0b7?", "private or unassigned character"),
        ("Том &amp; Джерри", "HTML entity"),
        ("Том &#39;Джерри&#39;", "HTML entity"),
    ],
)
def test_they_are_found(text: str, note: str) -> None:
    assert fault("characters", "Where is the station?", text, "ru") == note


@pytest.mark.parametrize(
    ("source", "text", "language"),
    [
        ("One.\nTwo.\tThree.", "Один.\n\tДва.\r\nТри.", "ru"),
        ("What does &amp; mean in HTML?", "HTML میں &amp; کا کیا مطلب ہے؟", "ur"),
        ("R&D; and more", "R&D; и другое", "ru"),
        ("A family 👨‍👩‍👧", "خانواده 👨‍👩‍👧 می‌رود", "fa"),
    ],
)
def test_near_misses(source: str, text: str, language: str) -> None:
    assert fault("characters", source, text, language) is None


def test_an_unpaired_surrogate_is_no_content_even_if_the_source_has_it() -> None:
    assert fault("characters", "Where \ud83d?", "Где \ud83d?", "ru") == "unpaired surrogate"


def test_a_source_with_an_entity_may_be_about_html() -> None:
    assert fault_of_source("characters", "What does &amp; mean in HTML?") is None
    assert fault_of_source("characters", "What does this mean\x00?") == "control character"
