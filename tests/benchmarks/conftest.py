"""A tiny setting for the benchmarks of steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import example_rows, write_jsonl

from benchmarks.steps.settings import StepSettings
from lightning_mlc.sources import ModelSource


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> StepSettings:
    return StepSettings(
        model=ModelSource(str(tiny_model)),
        data=str(write_jsonl(tmp_path / "pairs.jsonl", example_rows(16))),
        languages=("en", "sw", "zh"),
        batch_size=2,
        warm_up=0,
        steps=5,
        counted_steps=0,
        precision="32-true",
        device="cpu",
        gradient_checkpointing=False,
        learning_rate=1e-3,
        max_prompt_length=512,
        max_response_length=512,
        seed=3,
    )
