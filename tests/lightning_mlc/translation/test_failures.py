"""What is taken for a translation, and what is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from translators import SAMPLE

from lightning_mlc.translation import failures
from lightning_mlc.translation.failures import (
    LENGTH,
    REFUSED,
    SOURCE_LANGUAGE,
    STRUCTURE,
    TOO_LONG,
    checked,
    fault_of_reply,
)
from lightning_mlc.translation.languages import language_of
from lightning_mlc.translation.texts import Reply, Text

SOURCE = "How do I get a wine stain out of a white shirt before the party tonight?"


def failed(translation: str, target: str = "sw", source: str = SOURCE) -> str | None:
    text = Text(source, language_of("en"), language_of(target))
    return checked(text, Reply(translation)).failed


def test_each_reason_is_explained_in_the_docs() -> None:
    reasons = {value for name, value in vars(failures).items() if name.isupper() and isinstance(value, str)}
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert {STRUCTURE, REFUSED} < reasons
    table = page.partition("| reason | the reply |")[2].partition("\n\n")[0]  # `length` is a check, too
    assert [reason for reason in reasons if f"| `{reason}` |" not in table] == []


def test_the_translations_of_the_sample_pass() -> None:
    """Those into Kurdish and Chinese, under the codes that say the script."""
    found = [
        (row["id"], code, reason)
        for row in SAMPLE
        for code, translation in row["prompt"].items()
        if code != "en"
        and (reason := failed(translation, {"zh": "zh-Hans", "ku": "kmr"}.get(code, code), row["prompt"]["en"]))
    ]
    assert len(SAMPLE) * 9 == 972
    assert found == []


@pytest.mark.parametrize(
    ("translation", "reason"),
    [
        ("", "empty"),
        ("?!", "no letters"),
        ("Ninaondoaje " * 20, "loop"),
        ("Samahani, siwezi kusaidia na hilo.", REFUSED),
        ("I'm sorry, but I can't help with that request.", REFUSED),
        ("Shati", LENGTH),
        ("Hatua ya kwanza ni kuweka chumvi juu ya doa. Kisha osha shati kwa maji. " * 6, "loop"),
        ("Would you tell me the way in which a wine stain can be removed from white shirts?", SOURCE_LANGUAGE),
        (SOURCE, SOURCE_LANGUAGE),
        ("Как вывести винное пятно с белой рубашки до вечеринки?", "lint: language"),
    ],
)
def test_faults_have_a_reason(translation: str, reason: str) -> None:
    assert failed(translation) == reason


def test_short_texts_may_differ_in_length() -> None:
    assert failed("谢谢", "zh-Hans", "Thank you very much indeed") is None
    assert failed("Mamlaka ya Udhibiti wa Usalama Barabarani", "sw", "LATRA") is None


def test_an_answer_is_longer_than_a_translation() -> None:
    steps = "Kwanza weka chumvi. Pili osha kwa maji baridi. Tatu tumia siki nyeupe na sabuni. Nne suuza vizuri. "
    more = "Tano anika juani hadi shati likauke. Sita piga pasi. Saba vaa shati lako jipya kwa furaha usiku wa leo. "
    last = "Ukikosa siki, tumia maji ya limau yaliyokamuliwa, kisha subiri dakika kumi na tano kabla ya kufua nguo."
    assert failed(steps + more + last + " Mwisho.") == LENGTH


def test_what_has_no_letters_in_the_source_needs_none_in_the_translation() -> None:
    assert failed("2 + 2 = ?", source="2 + 2 = ?") is None


def test_a_prompt_that_declines_may_be_translated() -> None:
    assert failed("Samahani, siwezi kulala usiku.", source="I'm sorry, I can't sleep at night.") is None


def test_replies_without_structure_are_refusals_or_broken() -> None:
    assert fault_of_reply("I'm sorry, but I can't help with that.") == REFUSED
    assert fault_of_reply("Ninaondoaje doa la divai?") == STRUCTURE


def test_a_failure_stays_what_it_is() -> None:
    text = Text(SOURCE, language_of("en"), language_of("sw"))
    assert checked(text, Reply(None, TOO_LONG)) == Reply(None, TOO_LONG)
