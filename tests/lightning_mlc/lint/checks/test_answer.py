"""Answers in place of translations."""

from __future__ import annotations

import pytest
from translations import fault

SOURCE = "How can I open a locked door?"


@pytest.mark.parametrize(
    ("language", "text", "note"),
    [
        ("sw", "Samahani, siwezi kukusaidia na ombi hili.", "a refusal"),
        ("zh", "抱歉，我无法协助您完成这个请求。", "a refusal"),
        ("ru", "Извините, я не могу помочь с этим.", "a refusal"),
        ("ar", "آسف، لا أستطيع مساعدتك في ذلك.", "a refusal"),
        ("ur", "I'm sorry, but I can't help with that.", "a refusal"),
        ("sw", "Sure! You can call a locksmith.", "an answer"),
        ("de", "As an AI language model I have no doors.", "an answer"),
        ("de", "Tür öffnen:\n1. Rufen Sie an.\n2. Warten Sie.\n3. Zahlen Sie.\n4. Fertig.", "an answer of many lines"),
    ],
)
def test_answers_are_found(language: str, text: str, note: str) -> None:
    assert fault("answer", SOURCE, text, language) == note


@pytest.mark.parametrize(
    ("source", "language", "text"),
    [
        (SOURCE, "sw", "Ninawezaje kufungua mlango uliofungwa?"),
        (
            "I'm sorry, I can't come tomorrow. How do I say that politely?",
            "ru",
            "Извините, я не могу прийти завтра. Как это вежливо сказать?",
        ),
        ("I don't want to go. What now?", "sw", "Siwezi kwenda. Sasa nini?"),
        ("Sure, but how?", "de", "Sure, aber wie?"),
        ("Do this:\n1. a\n2. b\n3. c\n4. d", "de", "Mach das:\n1. a\n\n2. b\n\n3. c\n\n4. d"),
    ],
)
def test_translations_pass(source: str, language: str, text: str) -> None:
    assert fault("answer", source, text, language) is None
