"""Columns that hold several scripts."""

from __future__ import annotations

from translations import found, places, row

SORANI = "چۆن لە زستاندا پاسکیلەکەم لە ژەنگ بپارێزم؟"
KURMANJI = "Ez çawa dikarim duçerxeya xwe ji zengê biparêzim?"
SIMPLIFIED, TRADITIONAL = "请问这个车站的电话是什么？", "請問這個車站的電話是什麼？"


def test_the_rarer_script_is_found() -> None:
    rows = [row(1, {"en": "a", "ku": SORANI}), row(2, {"en": "b", "ku": SORANI}), row(3, {"en": "c", "ku": KURMANJI})]
    assert places("mixed_scripts", rows) == [(3, "ku")]
    assert found("mixed_scripts", rows)[0][1].note == "Latin script, most of the column is Arabic script"


def test_simplified_and_traditional_chinese() -> None:
    rows = [row(number, {"en": "a", "zh": TRADITIONAL}) for number in range(1, 4)]
    assert places("mixed_scripts", [*rows, row(4, {"en": "b", "zh": SIMPLIFIED})]) == [(4, "zh")]
    # Characters that both standards have say nothing.
    assert places("mixed_scripts", [*rows, row(4, {"en": "b", "zh": "今天天色很好，今天好"})]) == []


def test_one_script_each_in_two_columns_is_no_mixture() -> None:
    assert places("mixed_scripts", [row(1, {"en": "a", "ckb": SORANI, "kmr": KURMANJI})]) == []


def test_another_script_altogether_is_for_another_check() -> None:
    rows = [row(1, {"en": "a", "ru": "Где находится вокзал?"}), row(2, {"en": "b", "ru": "Where is the station?"})]
    assert places("mixed_scripts", rows) == []
