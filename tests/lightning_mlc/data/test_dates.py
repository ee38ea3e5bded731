"""Chat templates that write today's date, in a run that resumes tomorrow and with scores computed yesterday."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATE, columns, example_rows, save_model, write_jsonl
from transformers.utils import chat_template_utils

from lightning_mlc.commands.training import run
from lightning_mlc.reference import precomputed

DATED = "Today is {{ strftime_now('%A, %d %B %Y') }}.\n" + TEMPLATE


@pytest.fixture
def days(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Moves the clock that transformers gives to templates; ``days(3)`` is the third day."""

    def move(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
                return cls(2031, 5, day, 12, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return move


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", template=DATED)


def fit(model: Path, out: Path, *more: str) -> dict[str, list[float]]:
    """Metrics of a run that finds no tokenised table, so it renders all prompts today."""
    file, cache = model.parent / "pairs.jsonl", model.parent / "cache"
    if not file.exists():
        write_jsonl(file, example_rows(8))
    shutil.rmtree(cache / "tokenised", ignore_errors=True)
    options = [
        f"--out={out}", f"--model.name_or_path={model}", "--model.objective=DPO", "--model.optimizer=AdamW",
        "--model.optimizer.lr=1e-3", f"--data.train_path={file}", f"--data.cache_dir={cache}", "--data.val_share=0.25",
        "--data.batch_size=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
    ]  # fmt: skip
    run(["fit", *options, *more])
    return columns(out)


def test_the_clock_is_the_one_that_templates_ask(model: Path, days: Any) -> None:
    """Otherwise the tests below could not fail."""
    from transformers import AutoTokenizer

    days(2)
    text = AutoTokenizer.from_pretrained(model).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text.startswith("Today is Friday, 02 May 2031.")


@pytest.mark.slow
def test_a_run_that_goes_on_on_another_day_is_the_same_run(model: Path, tmp_path: Path, days: Any) -> None:
    days(1)
    whole = fit(model, tmp_path / "whole", "--trainer.max_steps=2")
    fit(model, tmp_path / "parts", "--trainer.max_steps=1")
    days(2)
    parts = fit(model, tmp_path / "parts", "--trainer.max_steps=2", "--ckpt_path=last")
    assert parts["train/loss"] == whole["train/loss"]
    states = [torch.load(tmp_path / out / "checkpoints" / "last.ckpt", weights_only=True) for out in ("whole", "parts")]
    recipes = [state["lightning_mlc"]["recipe"]["data"]["fingerprint"] for state in states]
    assert recipes[0] == recipes[1]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name]), name


@pytest.mark.slow
def test_scores_of_another_day_are_those_of_the_same_prompts(
    model: Path, tmp_path: Path, days: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--trainer.max_steps=1", "--model.reference.mode=precomputed")
    days(1)
    first = fit(model, tmp_path / "first", *options)
    monkeypatch.setattr(precomputed, "run_batch", lambda *_: pytest.fail("they are computed again"))
    days(2)
    assert fit(model, tmp_path / "second", *options) == first
    assert first["train/objective/loss"][0] == pytest.approx(0.693147, abs=1e-5)  # the policy is its own reference
