"""Which languages are asked for."""

from __future__ import annotations

import pytest

from lightning_mlc.errors import UserError
from lightning_mlc.translation.languages import language_of, redone, targets


def codes(*asked: str) -> list[str]:
    return [language.code for language in targets(asked, "en")]


def test_codes_are_canonical_and_keep_their_order() -> None:
    assert codes("UR", "zh-hans", "iw", "kmr", "en-GB") == ["ur", "zh-Hans", "he", "kmr", "en-GB"]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("ku", "languages: 'ku' does not say which script; write ckb (Sorani, Arabic script) or kmr (Kurmanji,"),
        ("zh", "languages: 'zh' does not say which script; write zh-Hans (simplified) or zh-Hant (traditional)"),
        ("sr", "languages: 'sr' does not say which script; write sr-Cyrl or sr-Latn"),
        ("cmn", "write zh-Hans"),
        ("sr-RS", "write sr-Cyrl or sr-Latn"),
        ("en", "languages: 'en' is the source language"),
        ("EN", "languages: 'en' is the source language"),
        ("klingon", "languages: 'klingon' is not a language code"),
    ],
)
def test_what_cannot_be_translated_into_is_refused_in_one_line(code: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        targets(["sw", code], "en")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("code", ["ckb", "kmr", "ku-Latn", "ku-Arab", "zh-Hant", "zh-TW", "zh-CN", "sr-Latn"])
def test_codes_that_say_the_script_are_taken(code: str) -> None:
    assert codes(code) == [code]


def test_no_language_and_the_same_one_twice_are_refused() -> None:
    with pytest.raises(UserError, match="is not set"):
        targets([], "en")
    with pytest.raises(UserError, match="given twice"):
        targets(["sw", "SW"], "en")


@pytest.mark.parametrize(
    ("code", "name", "script"),
    [
        ("sw", "Swahili", "Latn"),
        ("zh-Hant", "Traditional Chinese", "Hant"),
        ("zh-TW", "Traditional Chinese (as in TW)", "Hant"),
        ("ku-Arab", "Central Kurdish (Sorani, in Arabic script)", "Arab"),
        ("uz-Cyrl", "Uzbek in the script Cyrl", "Cyrl"),
        ("tlh", "the language with the BCP-47 code tlh", "Latn"),
    ],
)
def test_names_for_instructions_say_the_script_where_it_matters(code: str, name: str, script: str) -> None:
    language = language_of(code)
    assert (language.name, language.script) == (name, script)


def test_only_languages_of_the_translation_are_done_again() -> None:
    among = targets(["sw", "zh-Hans"], "en")
    assert redone(["ZH-hans"], among) == {"zh-Hans"}
    with pytest.raises(UserError, match=r"redo: 'ur' is not one of --languages \(sw, zh-Hans\)"):
        redone(["ur"], among)
