"""The function for one translation."""

from __future__ import annotations

import pytest

from lightning_mlc.errors import UserError
from lightning_mlc.lint import Finding, check_translation

SOURCE = "How do I keep my bicycle from rusting in winter?"


def test_a_good_translation_has_no_findings() -> None:
    assert check_translation(SOURCE, "Как зимой уберечь велосипед от ржавчины?", "en", "ru") == []


def test_findings_say_what_and_not_which_text() -> None:
    found = check_translation(SOURCE, SOURCE, "en", "ru")
    assert {finding.check for finding in found} == {"copy", "language", "script"}
    assert Finding("copy", "error", "ru", "a copy") in found
    assert not any("bicycle" in str(finding) for finding in found)


def test_codes_are_those_of_files() -> None:
    assert check_translation(SOURCE, "冬天怎样防止自行车生锈？", "EN", "zh-hans") == []
    with pytest.raises(UserError, match="'xx1' is not a language code"):
        check_translation(SOURCE, "a", "en", "xx1")


@pytest.mark.parametrize(
    ("text", "check"),
    [("?", "empty"), ("Извините, я не могу помочь с этим.", "answer"), ("Как зим\ufffdй?", "characters")],
)
def test_each_kind_of_error(text: str, check: str) -> None:
    assert [finding.check for finding in check_translation(SOURCE, text, "en", "ru")] == [check]
