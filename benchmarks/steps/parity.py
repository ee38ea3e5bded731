"""Check that the published recipe and ours compute the same losses in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.steps.measuring import disagreement, measure_variants
from benchmarks.steps.settings import StepSettings, plan_pairs
from lightning_mlc.errors import UserError

PARITY_BOUND = 1e-4
"""Largest accepted difference between losses. The order of float32 sums differs, which grows over optimizer steps."""
PARITY_RATE = 5e-6
"""Learning rate of the comparison, high enough that a wrong gradient shows in the losses."""


@dataclass(frozen=True)
class Parity:
    """Losses of the published recipe and of ours, in float32."""

    published: list[float]
    dpo_mlc: list[float]

    @property
    def largest_difference(self) -> float:
        return max((abs(a - b) for a, b in zip(self.published, self.dpo_mlc, strict=True)), default=float("nan"))

    @property
    def holds(self) -> bool:
        """Whether the losses agree. NaN does not agree."""
        return self.largest_difference <= PARITY_BOUND


def check_parity(settings: StepSettings, steps: int, folder: Path, logs: Path, say: Callable[[str], None]) -> Parity:
    """Return the losses of both over ``steps`` steps from the same weights, including those of the extractor.

    Raises:
        UserError: One of the two failed.
    """
    same = replace(
        settings,
        warm_up=0,
        steps=steps,
        counted_steps=0,
        precision="32-true",
        learning_rate=PARITY_RATE,
        extractor=str(folder / "extractor.safetensors"),
    )
    planned = plan_pairs(same)
    # In this order, because dpo_mlc writes the extractor that published reads.
    found = {
        variant: measured
        for one in ("dpo_mlc", "published")
        for variant, measured in measure_variants([one], same, planned, logs, say).items()
    }
    for variant, measured in found.items():
        if measured.failure:
            raise UserError(variant, f"{measured.failure}; see {logs / variant}.log")
    if wrong := disagreement(found, planned):
        raise UserError(None, wrong[0])
    return Parity(*([step.loss for step in found[name].steps] for name in ("published", "dpo_mlc")))
