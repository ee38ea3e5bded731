"""Cosines between the prompts of a step, whatever its micro-batches are, and the warning where they become one."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mlc.consistency.collapse import BETWEEN_PROMPTS, RAW_BETWEEN_PROMPTS, mean_prompt_cosine, prompt_sums
from lightning_mlc.training.step_metrics import StepMetrics


def finish(metrics: StepMetrics, trainer: Trainer) -> dict[str, Tensor]:
    metrics.close(trainer)
    found = metrics.read()
    assert found is not None
    return found


def trainer(accumulate: int = 1, every: int = 1) -> Trainer:
    options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": every}
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


def sums(states: Tensor) -> Tensor:
    return prompt_sums(states, torch.ones(states.shape[:2], dtype=torch.bool))


def micro_batch(states: Tensor, share: float, variance: float = 0.5) -> dict[str, Tensor]:
    """What a micro-batch adds, with a share of the step's explained variance."""
    values = {"loss": torch.tensor(2.0), "mlc/raw/explained_variance": torch.tensor(variance * share)}
    return values | {BETWEEN_PROMPTS: sums(states), RAW_BETWEEN_PROMPTS: sums(states)}


STATES = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("cuts", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_cosines_do_not_depend_on_micro_batches(cuts: list[int]) -> None:
    metrics, start = StepMetrics(("mlc/",)), 0
    for count in cuts:
        # As normalizers divide: Lightning averages over the micro-batches afterwards.
        metrics.add(micro_batch(STATES[start : start + count], len(cuts) * count / 6))
        start += count
    found = finish(metrics, trainer(accumulate=len(cuts)))
    assert float(found["loss"]) == 2
    assert float(found["mlc/raw/explained_variance"]) == pytest.approx(0.5)
    expected = float(mean_prompt_cosine(sums(STATES)))
    assert abs(expected) > 0.01
    for name in (BETWEEN_PROMPTS, RAW_BETWEEN_PROMPTS):
        assert float(found[name]) == pytest.approx(expected, rel=1e-6)


def test_a_step_with_one_prompt_repeats_the_latest_value() -> None:
    metrics, one = StepMetrics(("mlc/",)), trainer()
    metrics.add(micro_batch(STATES[:1], 1.0))
    assert BETWEEN_PROMPTS not in finish(metrics, one)
    metrics.add(micro_batch(STATES, 1.0))
    before = finish(metrics, one)[BETWEEN_PROMPTS]
    metrics.add(micro_batch(STATES[:1], 1.0))
    assert finish(metrics, one)[BETWEEN_PROMPTS] == before


def test_a_step_that_is_not_logged_has_no_cosines() -> None:
    metrics = StepMetrics(("mlc/",))
    metrics.add({"loss": torch.tensor(2.0)})
    assert finish(metrics, trainer(every=5)).keys() == {"loss"}


def test_one_warning_of_a_run(caplog: pytest.LogCaptureFixture) -> None:
    metrics, one = StepMetrics(("mlc/",)), trainer()
    alike = torch.ones(6, 3, 4, dtype=torch.float64) + 0.01 * STATES
    with caplog.at_level(logging.WARNING, logger="lightning_mlc"):
        for states, variance in ((STATES, 0.99), (STATES, 0.99), (alike, 0.9), (alike, 0.99), (alike, 0.99)):
            metrics.add(micro_batch(states, 1.0, variance))
            finish(metrics, one)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "lightning_mlc"]
    assert message.startswith("All prompts fall onto one line")
    assert "turn on model.consistency.retain or model.consistency.contrast" in message
