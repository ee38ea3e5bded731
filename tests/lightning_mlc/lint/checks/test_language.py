"""Texts in another language than their column says."""

from __future__ import annotations

import pytest
from translations import fault, fault_of_source

from lightning_mlc.errors import UserError
from lightning_mlc.lint.checks.language import Language

SOURCE = "How do I keep my bicycle from rusting in winter?"
TEXTS = {
    "zh": "冬天怎样才能防止我的自行车生锈？",
    "ru": "Как зимой уберечь велосипед от ржавчины?",
    "sw": "Ninawezaje kuzuia baiskeli yangu isipate kutu wakati wa baridi?",
    "ur": "میں سردیوں میں اپنی سائیکل کو زنگ لگنے سے کیسے بچاؤں؟",
    "ps": "زه څنګه په ژمي کې خپل بایسکل له زنګ وهلو وساتم؟",
    "ku": "Ez çawa dikarim zivistanê duçerxeya xwe ji zengê biparêzim?",
    "ckb": "چۆن لە زستاندا پاسکیلەکەم لە ژەنگ بپارێزم؟",
    "fr": "Comment protéger mon vélo de la rouille en hiver ?",
    "de": "Wie schütze ich mein Fahrrad im Winter vor Rost?",
}


@pytest.mark.parametrize("language", TEXTS)
def test_right_languages_pass(language: str) -> None:
    assert fault("language", SOURCE, TEXTS[language], language) is None


@pytest.mark.parametrize(
    ("column", "language", "note"),
    [
        ("sw", "fr", "fr"),
        ("ur", "ps", "ps"),
        ("ps", "ur", "ur"),
        ("fr", "de", "de"),
        ("ur", "ckb", "ckb"),
        ("ru", "zh", "zh"),
        ("zh-Hant", "ru", "ru"),
    ],
)
def test_other_languages_are_found(column: str, language: str, note: str) -> None:
    assert fault("language", SOURCE, TEXTS[language], column) == f"looks like {note}"


@pytest.mark.parametrize("column", ["ku", "kmr", "ckb"])
@pytest.mark.parametrize("language", ["ku", "ckb"])
def test_nobody_is_told_that_a_text_is_in_the_wrong_kurdish(column: str, language: str) -> None:
    """That is for the script to say."""
    assert fault("language", SOURCE, TEXTS[language], column) is None


def test_related_languages_are_one() -> None:
    assert fault("language", SOURCE, "Hvordan beskytter jeg sykkelen min mot rust om vinteren?", "nb") is None
    assert fault("language", SOURCE, "Kako da zaštitim svoj bicikl od hrđe tijekom zime?", "bs") is None


@pytest.mark.parametrize(
    "text", ["Comment ?", "https://example.org/la/page/de/garde", "`pour chaque mot dans la liste`"]
)
def test_what_is_short_or_no_prose_is_not_judged(text: str) -> None:
    assert fault("language", SOURCE, text, "sw") is None


def test_a_column_that_the_identifier_does_not_know_is_not_judged() -> None:
    assert fault("language", SOURCE, TEXTS["fr"], "haw") is None


def test_the_source_is_checked_too() -> None:
    assert fault_of_source("language", SOURCE) is None
    assert fault_of_source("language", TEXTS["de"]) == "looks like de"


def test_without_the_package_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Language, "packages", ("no_such_package",))
    with pytest.raises(UserError, match=r"needs no_such_package: run `pip install no_such_package`"):
        Language.require_packages()
