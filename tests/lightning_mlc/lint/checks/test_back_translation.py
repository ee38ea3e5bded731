"""Texts that are translated back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from translations import row

sys.path.insert(0, str(Path(__file__).parents[2] / "translation"))
sys.path.insert(0, str(Path(__file__).parents[2] / "evaluation"))
from fake_endpoint import completion, serve
from translators import SAMPLE, save_nllb, translate_from_sample

from lightning_mlc.cli import main
from lightning_mlc.errors import UserError
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.linting import choose_checks
from lightning_mlc.lint.texts import Text


def rows(wrong: dict[int, int]) -> list[dict[str, Any]]:
    """The first rows of the sample in two languages. In Swahili, some have the translation of another row."""
    prompts = [row["prompt"] for row in SAMPLE[:24]]
    return [
        {"prompt": {"en": prompt["en"], "ru": prompt["ru"], "sw": prompts[wrong.get(n, n)]["sw"]}}
        for n, prompt in enumerate(prompts)
    ]


def test_the_translation_of_another_row_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The translator knows the sample by heart. It declines one text, which is no finding."""
    path = str(write_jsonl(tmp_path / "a.jsonl", rows({5: 17})))
    declined = SAMPLE[9]["prompt"]["sw"]

    def translate(content: str, before: int) -> Any:
        return completion("I can't help with that.") if declined in content else translate_from_sample(content)

    with serve(translate) as served:
        assert main(["lint", path, "--translator", f"{served.url}#m", "--only", "back_translation"]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("texts to be translated back: none leaves this machine, they are sent to 127.0.0.1\n")
    found = [line for line in told.out.splitlines() if "back_translation (" in line]
    assert len(found) == 1
    assert f"{path} row 6 sw: back_translation (chrF " in found[0]
    assert found[0].endswith(", 1e+02 is the column's median)")
    # Each text once, and the declined one twice.
    assert len(served.bodies) == 48 - 1 + 1
    assert not [row["prompt"]["en"] for row in SAMPLE if row["prompt"]["en"] in told.out + told.err]


class Shortening:
    """Knows the sample by heart, and loses the end of some texts."""

    def __init__(self, shares: dict[int, float]) -> None:
        self._sources = {row["prompt"]["sw"]: row["prompt"]["en"] for row in SAMPLE}
        self._shares = {SAMPLE[number]["prompt"]["sw"]: share for number, share in shares.items()}

    def back(self, texts: Sequence[Text], language: str) -> list[str | None]:
        whole = {text.content: self._sources[text.content] for text in texts}
        return [source[: int(len(source) * self._shares.get(text, 1))] for text, source in whole.items()]


def test_a_third_of_the_way_is_the_limit() -> None:
    """Whole texts have 100, unrelated ones 16, so 44 is the limit: about half of a text."""
    rows = [row(n, {"en": one["prompt"]["en"], "sw": one["prompt"]["sw"]}) for n, one in enumerate(SAMPLE[:24])]
    settings = LintSettings(translator=Shortening({2: 0.65, 7: 0.3, 11: 0.55, 15: 0.35}))
    (check,) = choose_checks(settings, only=["back_translation"])
    for one in rows:
        check.learn(0, one)
    assert [one.where.number for one in rows if list(check.check(0, one))] == [7, 15]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--translator", "http://far.example/v1#m"],
            "--translator: far.example is not this machine, and texts",
        ),
        (["--translator", "http://127.0.0.1/v1"], "--translator: write an endpoint as http://HOST/v1#MODEL"),
        (["--translator", "./gone"], "--translator: there is no folder ./gone"),
        (["--allow_remote", "far.example"], "--allow_remote: needs --translator"),
    ],
)
def test_texts_stay_here_unless_a_host_is_allowed(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows({})))
    assert main(["lint", path, *options]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_a_translation_model_says_which_language_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": {"en": "Where is it?", "la": "Ubi est?"}}]))
    model = str(save_nllb(tmp_path / "nllb"))
    assert main(["lint", path, "--translator", model, "--device", "cpu", "--only", "back_translation"]) == 2
    assert "this NLLB model does not know 'la'; give another model" in capsys.readouterr().err


def test_it_needs_a_translator() -> None:
    with pytest.raises(UserError, match="needs --translator"):
        choose_checks(LintSettings(), only=["back_translation"])
