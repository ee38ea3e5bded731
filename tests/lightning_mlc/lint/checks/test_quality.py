"""Translations that a model of quality estimation scores low. The model counts: one ``b`` for each ``a``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model, write_jsonl
from quality_models import counted, save_counting_model

from lightning_mlc.cli import main
from lightning_mlc.errors import UserError
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.linting import choose_checks


class Heard(logging.Handler):
    """Keeps what is logged. transformers' loggers hand nothing on to those above them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


LENGTHS = [8 + n if n % 2 else 60 - n for n in range(40)]
"""Neighbours differ, so that each text has a bad score with the source of the row before."""
WRONG = {4: 3.0, 13: 1.6, 30: 0.25}
"""Rows whose translation is so many times as long as it should be. Scores of good ones are 0.8884, of unrelated ones
0.8800 in the middle, so 0.8842 is the limit. That of 1.6 is 0.8831."""
NEAR = {20: 1.45}
"""It has 0.8852."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_counting_model(tmp_path_factory.mktemp("models") / "counting")


def rows(wrong: dict[int, float]) -> list[dict[str, Any]]:
    """Good translations in two languages, off by one letter at most, and others in Swahili."""
    return [
        {
            "prompt": {
                "en": "a" * length,
                "sw": "b" * round(length * wrong[n] if n in wrong else length + n % 3 - 1),
                "ur": "b" * length,
            }
        }
        for n, length in enumerate(LENGTHS)
    ]


def test_planted_faults_are_found_and_good_translations_are_not(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows(WRONG | NEAR)))
    report, page, fixed = (tmp_path / name for name in ("out.json", "out.html", "fixed.jsonl"))
    options = ["--quality", str(model), "--device", "cpu", "--only", "quality", "--json", str(report)]
    assert main(["lint", path, *options, "--html", str(page), "--fix", "--out", str(fixed)]) == 0
    told = capsys.readouterr().out
    document = json.loads(report.read_text())
    assert document["checks"]["quality"] == {
        "severity": "warning",
        "title": "a low score of quality estimation",
        "counts": {"en": 0, "sw": 3, "ur": 0},
    }
    assert [(found["row"] - 1, found["language"]) for found in document["findings"]] == [(n, "sw") for n in WRONG]
    length = LENGTHS[4]
    note = f"quality {counted('a' * length, 'b' * 3 * length):.2g}, "
    assert document["findings"][0]["note"].startswith(note)
    assert document["columns"] == []
    assert f"row 5 sw: quality ({note}" in told
    assert "a low score of quality estimation" in page.read_text()
    # A warning changes nothing.
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == rows(WRONG | NEAR)


def test_a_model_that_scores_errors_is_named_as_such(tmp_path: Path) -> None:
    """Its larger scores are the worse ones, as those of HTER."""
    path = str(write_jsonl(tmp_path / "a.jsonl", rows({})))
    other = str(save_counting_model(tmp_path / "other", better=-1))
    options = ["--quality", other, "--device", "cpu", "--only", "quality", "--json", str(tmp_path / "out.json")]
    assert main(["lint", path, *options]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["findings"] == []
    assert [found["language"] for found in document["columns"]] == ["sw", "ur"]
    assert all(found["note"].endswith("and are its larger scores the better ones?") for found in document["columns"])


def test_it_needs_a_model_of_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    with pytest.raises(UserError, match="needs --quality"):
        choose_checks(LintSettings(), only=["quality"])
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": {"en": "a"}}]))
    chat = str(save_model(tmp_path / "chat"))
    capsys.readouterr()  # a bar of the line before
    for options, said in (
        (["--quality", chat], f"--quality: {chat} is a LlamaForCausalLM and estimates no quality"),
        (["--quality", "./gone"], "--quality: there is no folder ./gone"),
        (["--quality", str(model), "--device", "cuda:99"], "--device: cannot use cuda:99"),
    ):
        assert main(["lint", path, *options]) == 2
        told = capsys.readouterr().err
        assert f"error: {said}" in told
        assert len(told.splitlines()) == 1


def test_loading_a_model_says_nothing(tmp_path: Path, model: Path) -> None:
    """Of layers that several devices would share, for example: there is one device."""
    path = str(write_jsonl(tmp_path / "a.jsonl", rows({})))
    heard, logger = Heard(), logging.getLogger("transformers")
    logger.addHandler(heard)
    try:
        assert main(["lint", path, "--quality", str(model), "--device", "cpu", "--only", "quality"]) == 0
    finally:
        logger.removeHandler(heard)
    assert heard.messages == []
