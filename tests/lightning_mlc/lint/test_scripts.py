"""Scripts of texts and of languages."""

from __future__ import annotations

import pytest

from lightning_mlc.lint.scripts import count_scripts, is_written_in, main_script, scripts_of, share_of_others


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Where? 12!", "Latn"),
        ("Где?", "Cyrl"),
        ("أين؟", "Arab"),
        ("কোথায়", "Beng"),
        ("어디", "Hang"),
        ("どこですか", "Jpan"),
        ("東京の駅", "Jpan"),
        ("说话", "Hans"),
        ("說話", "Hant"),
        ("山水", "Hani"),
        ("我喜欢日本の歌和日本的电影还有中国的电视节目", "Hans"),  # a kana in Chinese
        ("12 + 3 = ?", None),
    ],
)
def test_the_script_of_a_text(text: str, script: str | None) -> None:
    assert main_script(count_scripts(text), text) == script


def test_letters_and_vowel_signs_are_counted() -> None:
    assert count_scripts("কি? a1 שָׁ 说か") == {"Beng": 2, "Latn": 1, "Hebr": 3, "Hani": 3, "Hira": 2}


@pytest.mark.parametrize(
    ("language", "scripts"),
    [
        ("en", ("Latn",)),
        ("ku", ("Latn", "Arab", "Cyrl")),
        ("ckb", ("Arab",)),
        ("kmr", ("Latn",)),
        ("sr", ("Cyrl", "Latn")),
        ("sr-Latn", ("Latn",)),
        ("zh", ("Hans", "Hant")),
        ("zh-TW", ("Hant",)),
        ("yue", ("Hant",)),
    ],
)
def test_the_scripts_of_a_language(language: str, scripts: tuple[str, ...]) -> None:
    assert scripts_of(language) == scripts


def test_what_counts_as_written_in_a_script() -> None:
    assert is_written_in("Hani", "Hans")
    assert is_written_in("Hans", "Jpan")
    assert not is_written_in("Jpan", "Hans")
    assert not is_written_in("Hant", "Hans")


def test_a_chinese_character_is_worth_three_letters() -> None:
    assert share_of_others(count_scripts("说话 abcdef"), "zh") == 0.5
    assert share_of_others(count_scripts("どこ ab"), "ja") == pytest.approx(1 / 3)
