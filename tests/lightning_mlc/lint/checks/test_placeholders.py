"""Links, code, placeholders and emoji that are lost."""

from __future__ import annotations

import pytest
from translations import fault


@pytest.mark.parametrize(
    ("source", "language", "text"),
    [
        ("Read https://example.org/a?b=c.", "sw", "Soma hiyo."),
        ("Write to ann@example.org!", "ru", "Напишите Анне!"),
        ("What does `len(x)` return?", "zh", "长度返回什么？"),
        ("Dear {name}, you owe %d.", "ur", "پیارے {name}، آپ پر قرض ہے۔"),
        ("What does <b> do?", "bn", "এটি কী করে?"),
    ],
)
def test_what_is_lost_is_found(source: str, language: str, text: str) -> None:
    assert fault("placeholders", source, text, language) == "a link, code or a placeholder lost"


def test_a_lost_emoji_is_found() -> None:
    assert fault("placeholders", "Good night 😴❤️", "Lala salama ❤️", "sw") == "an emoji lost"


@pytest.mark.parametrize(
    ("source", "language", "text"),
    [
        ("Read https://example.org/a?b=c.", "sw", "Soma https://example.org/a?b=c sasa."),
        ("What does `len(x)` return?", "zh", "“len(x)” 返回什么？"),
        ("Dear {name}, you owe %d.", "ur", "%d کا قرض، {name}"),
        ("Good night 😴❤️", "sw", "❤️😴 Lala salama"),
        ("It is 100% sure; a < b and c > d", "sw", "Ni hakika asilimia 100; a < b na c > d"),
    ],
)
def test_what_is_kept_passes(source: str, language: str, text: str) -> None:
    assert fault("placeholders", source, text, language) is None
