"""Texts that mean something else, with a model whose meanings are letters: an anagram is a translation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import save_model, write_jsonl
from sentence_models import save_sentence_model

from lightning_mlc.cli import main
from lightning_mlc.data.reading import read_rows
from lightning_mlc.errors import UserError
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.linting import choose_checks, lint
from lightning_mlc.sources import ModelSource

SOURCES = [dict(row)["prompt"]["en"] for _, row in read_rows("sample", "FILE")][:40]


def anagram(text: str) -> str:
    letters = list(text)
    random.Random(text).shuffle(letters)
    return "".join(letters)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence_model(tmp_path_factory.mktemp("models") / "letters")


def test_the_translation_of_another_row_is_found(tmp_path: Path, model: Path) -> None:
    wrong = {4: 39, 13: 37}
    rows = [{"prompt": {"en": text, "sw": anagram(SOURCES[wrong.get(n, n)])}} for n, text in enumerate(SOURCES)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    settings = LintSettings("en", (path,), embeddings=ModelSource(str(model)), device="cpu")
    report = lint([path], "en", choose_checks(settings, only=["meaning"]))
    assert [found.row - 1 for found in report.of_rows] == list(wrong)
    assert report.of_columns == []
    assert all(found.finding.note.startswith("cosine 0.") for found in report.of_rows)


def test_the_command_says_that_a_model_does_not_know_a_language(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": {"en": text, "sw": anagram(SOURCES[n - 1]), "ru": text[::-1]}} for n, text in enumerate(SOURCES)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    options = ["--embeddings", str(model), "--device", "cpu", "--only", "meaning", "--json", str(tmp_path / "out.json")]
    assert main(["lint", path, *options]) == 0
    (finding,) = json.loads((tmp_path / "out.json").read_text())["columns"]
    assert (finding["check"], finding["language"]) == ("meaning", "sw")


def test_it_needs_a_model_of_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="needs --embeddings"):
        choose_checks(LintSettings(), only=["meaning"])
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": {"en": "a"}}]))
    chat = str(save_model(tmp_path / "chat"))
    for options, said in (
        (["--embeddings", chat], "--embeddings: cannot read modules.json"),
        (["--embeddings", "./gone"], "--embeddings: there is no folder ./gone"),
        (["--embeddings", chat, "--device", "cuda:99"], "--device: cannot use cuda:99"),
        (["--device", "cpu"], "--device: needs --embeddings, --quality or --translator"),
    ):
        assert main(["lint", path, *options]) == 2
        assert f"error: {said}" in capsys.readouterr().err
