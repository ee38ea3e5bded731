"""The benchmark of the plug-in: its variants train the same, and its verdicts follow from the figures."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.plugin import (
    SAME_LOSS,
    Arithmetic,
    added_per_share,
    arithmetic,
    arithmetic_of_steps,
    largest_difference,
    targets,
    write,
)
from benchmarks.published import Pair
from benchmarks.steps.measuring import VariantMeasurements
from benchmarks.steps.settings import StepSettings, plan_pairs
from benchmarks.steps.turns import Memory, Step, Turns
from benchmarks.steps.variants import VARIANTS
from lightning_mlc.models.flops import ModelFlops

CPU = torch.device("cpu")


@pytest.fixture
def settings(settings: StepSettings) -> StepSettings:
    return replace(settings, steps=4)


def losses(variant: str, settings: StepSettings) -> list[float]:
    """Run a variant in this process, with every step asked for in advance."""
    planned = plan_pairs(settings)
    here, there = Pipe()
    for _ in range(len(planned) + 1):
        here.send("next")
    VARIANTS[variant](settings, planned, Turns(there, CPU))
    assert here.recv() == "ready"
    return [here.recv().loss for _ in planned]


@pytest.mark.slow
def test_plug_in_and_sum_train_the_same(settings: StepSettings) -> None:
    pytest.importorskip("trl")
    alone, added, total = (losses(variant, settings) for variant in ("trl", "trl_mlc", "trl_mlc_sum"))
    assert added == pytest.approx(total, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(added, total, strict=True)) < SAME_LOSS["32-true"]
    # The loss is there, and the weights move.
    assert added[0] > alone[0] + 1e-2
    assert alone[-1] != pytest.approx(alone[0], abs=1e-4)


def test_arithmetic_by_hand(tiny_model: Path) -> None:
    flops = ModelFlops.of(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert flops is not None
    pair = Pair("a", ([1, 2], [3, 4, 5]), [6], [7, 8])
    found = arithmetic(flops, [pair], [2, 3])
    # The tiny Llama: 3 layers, 32 wide, 4 heads of 8, half as many for keys and values, 48 inside.
    weights, head = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), flops.head_weights
    # Two rows of 3 and 4 tokens: each weight 4 times forward (policy, reference) or backward (inputs, weights).
    attention = 3 * 2 * 32 * (3 * 3 + 4 * 4)
    assert found.objective == 2 * (4 * 7 * (weights + head) + 4 * attention)
    attention = 3 * 2 * 32 * (2 * 2 + 3 * 3)
    assert found.translations == 2 * (3 * 5 * weights + 3 * attention)


def test_each_step_has_its_own_prompts(settings: StepSettings) -> None:
    found = arithmetic_of_steps(settings, plan_pairs(settings))
    assert len(found) == 4
    assert all(0 < step.share < 1 for step in found)


def measured(seconds: list[float], gigabytes: float, losses: list[float] | None = None) -> VariantMeasurements:
    """A worker that needed 99 s for a first step that does not count."""
    values = losses or [0.5] * (len(seconds) + 1)
    steps = [Step(s, ("a",), loss) for s, loss in zip([99.0, *seconds], values, strict=True)]
    return VariantMeasurements(1, steps, [], Memory(10**9, int(gigabytes * 1e9)))


ALONE, ADDED = measured([2.0, 4.0, 2.0], 4.0), measured([3.0, 6.0, 4.0], 4.5)
SUM, FIT = measured([3.0, 5.0, 4.0], 6.0), measured([1.5, 3.0, 2.0], 3.6)
STEPS = [Arithmetic(1.0, 9.0), Arithmetic(2.0, 1.0), Arithmetic(4.0, 1.0), Arithmetic(2.0, 1.0)]


def test_added_time_is_compared_step_by_step() -> None:
    # 0.5 / 0.5, 0.5 / 0.25 and 1 / 0.5
    assert added_per_share(ALONE, ADDED, STEPS) == pytest.approx(2.0)


def test_targets() -> None:
    found = targets({"trl": ALONE, "trl_mlc": ADDED, "trl_mlc_sum": SUM, "dpo_mlc": FIT}, STEPS)
    assert [target.value for target in found] == pytest.approx([2.0, 0.75, 1.0, 0.5, 0.8])
    assert [target.met for target in found] == [False, True, None, None, None]


def test_no_verdict_without_figures() -> None:
    found = targets({"trl": ALONE, "trl_mlc": VariantMeasurements(failure="out of memory"), "dpo_mlc": FIT}, STEPS)
    assert [target.value for target in found] == [None] * 5


def test_disagreeing_losses_are_seen() -> None:
    other = replace(SUM, steps=[step._replace(loss=step.loss + 0.25) for step in SUM.steps])
    assert largest_difference({"trl_mlc": ADDED, "trl_mlc_sum": other}) == 0.25
    assert largest_difference({"trl_mlc": ADDED}) is None


def test_results_are_written(tmp_path: Path) -> None:
    names = {"trl": ALONE, "trl_mlc": ADDED, "trl_mlc_sum": VariantMeasurements(failure="out of memory")}
    shown = {"device": "cpu", "name": "tiny", "batch_size": 2, "languages": ["en", "sw"], "precision": "32-true"}
    found = write(tmp_path, shown, names, [], STEPS, targets(names, STEPS))
    written = json.loads((tmp_path / "plugin.json").read_text())
    assert [row["variant"] for row in written["results"]] == ["trl", "trl_mlc"]
    assert written["failures"] == {"trl_mlc_sum": "out of memory"}
    assert written["share_of_translations"] == 0.5
    assert {"device", "commit", "trl", "torch"} <= written["environment"].keys()
    assert written["targets"][0]["met"] is False
    assert (tmp_path / "plugin.png").stat().st_size > 1000
    assert "trl_mlc" in found
