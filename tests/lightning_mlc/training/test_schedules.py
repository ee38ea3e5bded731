"""Learning rates against the shapes that give the schedules their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lightning_mlc.errors import UserError
from lightning_mlc.training.schedules import Warmup


def rates(steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = Warmup(optimizer, **options)
    schedule.set_total_steps(steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warms_up_then_decays_linearly() -> None:
    assert rates(6, warmup=2, decay="linear") == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_constant_after_a_fraction_of_warmup() -> None:
    assert rates(4, warmup=0.25, decay="constant") == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_cosine_ends_at_the_final_share() -> None:
    found = rates(101, warmup=0, decay="cosine", final=0.1)
    assert found[0] == pytest.approx(1.0)
    assert found[50] == pytest.approx(0.1 + 0.9 * 0.5, abs=0.02)
    assert found[100] == pytest.approx(0.1, abs=1e-3)


def test_a_configured_length_wins_over_the_trainers() -> None:
    assert rates(2, warmup=0, decay="linear", total_steps=10) == pytest.approx([1.0, 0.9])


@pytest.mark.parametrize("steps", [1, 2, 10, 33, 65])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_from_zero_it_is_the_schedule_of_transformers(decay: Any, steps: int, tmp_path: Path) -> None:
    """As its trainer makes it, from the same share of warm-up."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        lr_scheduler_type="constant_with_warmup" if decay == "constant" else decay,
        warmup_steps=0.1,
        use_cpu=True,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, optimizers=(optimizer, None))
    theirs = trainer.create_scheduler(steps, optimizer)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(steps, warmup=0.1, decay=decay, from_zero=True) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_groups_keep_their_own_rates() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 10.0)]
    optimizer = torch.optim.SGD(groups)
    Warmup(optimizer, warmup=1, decay="constant").set_total_steps(4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 5.0])


@pytest.mark.parametrize("options", [{"warmup": -1}, {"final": 2}])
def test_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"model\.scheduler"):
        rates(1, **options)
