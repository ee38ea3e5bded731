"""Texts in a script that their language is not written in."""

from __future__ import annotations

import pytest
from translations import fault, fault_of_source

SOURCE = "Where is the station?"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("ru", "Где находится вокзал?"),
        ("ja", "駅はどこですか？"),
        ("ja", "東京駅構内案内図"),
        ("ko", "역이 어디에 있나요?"),
        ("zh", "车站在哪里？"),
        ("zh", "車站在哪裡？"),
        ("zh-Hant", "車站在哪裡？"),
        ("zh-TW", "車站在哪裡？"),
        ("sr", "Где је станица?"),
        ("sr", "Gde je stanica?"),
        ("ku", "Îstasyon li ku ye?"),
        ("ku", "وێستگەکە لە کوێیە؟"),
        ("ckb", "وێستگەکە لە کوێیە؟"),
        ("zh", "请用 JavaScript 写排序函数"),
        ("bn", "`print(1)` কী করে?"),
        ("ru", "SQL"),
    ],
)
def test_usual_scripts_pass(language: str, text: str) -> None:
    assert fault("script", SOURCE, text, language) is None


@pytest.mark.parametrize(
    ("language", "text", "note"),
    [
        ("ru", "Gde nakhoditsya vokzal?", "Latin script instead of Cyrillic script"),
        ("ckb", "Wêstgeke le kwêye?", "Latin script instead of Arabic script"),
        ("kmr", "ئیستگەه ل کیدەرێ یە؟", "Arabic script instead of Latin script"),
        ("sr-Latn", "Где је станица?", "Cyrillic script instead of Latin script"),
        ("zh", "駅はどこにありますか？", "Japanese script instead of simplified Chinese characters"),
        (
            "zh-Hant",
            "车站在哪里？请问这个电话",
            "simplified Chinese characters instead of traditional Chinese characters",
        ),
        (
            "zh-CN",
            "車站在哪裡？請問這個電話",
            "traditional Chinese characters instead of simplified Chinese characters",
        ),
        ("ur", "स्टेशन कहाँ है?", "Devanagari instead of Arabic script"),
    ],
)
def test_other_scripts_are_found(language: str, text: str, note: str) -> None:
    assert fault("script", SOURCE, text, language) == note


def test_the_source_is_checked_too() -> None:
    assert fault_of_source("script", "Где находится вокзал?") == "Cyrillic script instead of Latin script"
    assert fault_of_source("script", SOURCE) is None
