"""Languages that a tokenizer covers badly."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import save_model
from translations import row

from lightning_mlc.errors import UserError
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.linting import choose_checks
from lightning_mlc.sources import ModelSource

ROWS = [
    # Bytes are tokens here: 3 for each Bengali character, 2 for each Cyrillic one.
    row(1, {"en": "aaaa", "bn": "কককক", "ru": "аааа"}),
    row(2, {"en": "aa", "bn": "কক", "ru": "ааа"}),
]


def test_a_language_of_many_tokens_is_found(tmp_path: Path) -> None:
    settings = LintSettings("en", ("hand.jsonl",), ModelSource(str(save_model(tmp_path / "model"))))
    (check,) = choose_checks(settings, only=["tokens"])
    assert [finding for one in ROWS for finding in check.check(0, one)] == []
    assert [(found.language, found.note) for found in check.columns()] == [
        ("bn", "3.0 times as many tokens as the source")
    ]


def test_it_needs_a_model() -> None:
    with pytest.raises(UserError, match="needs --model"):
        choose_checks(LintSettings(), only=["tokens"])
    assert "tokens" not in {check.name for check in choose_checks(LintSettings())}
