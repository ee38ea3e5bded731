"""Figures of the variants, and the project's targets for them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.architectures import SMOLLM2
from benchmarks.published import Pair
from benchmarks.steps.measuring import VariantMeasurements
from benchmarks.steps.settings import StepSettings
from benchmarks.timing import quantiles

WITH_TRANSLATIONS = ("published", "dpo_mlc")
"""Variants that also run the translated prompts."""


@dataclass(frozen=True)
class Result:
    """Figures of a variant. Tokens, positions and FLOPs are means over the counted steps."""

    variant: str
    seconds: float
    """Median time of a step."""
    seconds_p20: float
    seconds_p80: float
    steps: int
    bytes_before: int
    """In use before the first step: libraries and models."""
    peak_bytes: int
    real_tokens: float | None
    """Tokens in the rows that the variant trains on, without padding. Each row counts in full."""
    trained_positions: float | None
    """Positions that the policy computes, including padding."""
    frozen_positions: float | None
    """Positions that the reference computes, including padding."""
    flops: float | None
    flops_per_second: float | None


def result(variant: str, measured: VariantMeasurements, planned: list[list[Pair]]) -> Result:
    """Return the figures of a variant that did not fail."""
    assert measured.memory is not None
    median, p20, p80, steps = quantiles([step.seconds for step in measured.timed])
    counts = measured.counts
    tokens = [
        sum(pair.pair_tokens + (pair.translation_tokens if variant in WITH_TRANSLATIONS else 0) for pair in pairs)
        for pairs in planned[measured.warm_up :][: len(counts)]
    ]
    return Result(
        variant,
        median,
        p20,
        p80,
        steps,
        bytes_before=measured.memory.before,
        peak_bytes=measured.memory.peak,
        real_tokens=_mean(tokens),
        trained_positions=_mean([count.trained for count in counts]),
        frozen_positions=_mean([count.frozen for count in counts]),
        flops=_mean([count.flops for count in counts]),
        flops_per_second=_mean([flops / seconds for seconds, flops in measured.seconds_and_flops]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


@dataclass(frozen=True)
class Target:
    """An upper bound that the project aims to meet."""

    name: str
    bound: float
    value: float | None
    """None if it was not measured."""
    stated: bool = True
    """Whether the bound applies to these settings."""

    @property
    def met(self) -> bool | None:
        """Whether the bound is met; None if it does not apply or nothing was measured."""
        return None if self.value is None or not self.stated else self.value <= self.bound


def targets(measured: Mapping[str, VariantMeasurements], usual: bool = True) -> list[Target]:
    """Return every target with its measured value; ``usual`` is the result of `is_usual` for the settings."""
    ours, published, dpo, trl = (measured.get(name) for name in ("dpo_mlc", "published", "dpo", "trl"))
    return [
        Target("time of a step, dpo_mlc / published", 0.40, ratio(ours, published, _seconds), usual),
        Target("peak memory, dpo_mlc / published", 0.35, ratio(ours, published, _peak), usual),
        Target("time of a step per FLOP, dpo_mlc / dpo", 1.10, ratio(ours, dpo, _seconds_per_flop)),
        Target("time of a step, dpo / trl", 1.00, ratio(dpo, trl, _seconds)),
        Target("peak memory, dpo / trl", 1.00, ratio(dpo, trl, _peak)),
    ]


def is_usual(settings: StepSettings) -> bool:
    """Whether the targets against the published recipe apply: SmolLM2 on a CPU, 2 pairs in a step, 10 languages."""
    return (
        settings.model == SMOLLM2
        and settings.device == "cpu"
        and settings.batch_size == 2
        and len(settings.languages) == 10
    )


def ratio(
    ours: VariantMeasurements | None,
    theirs: VariantMeasurements | None,
    figures: Callable[[VariantMeasurements], list[float]],
) -> float | None:
    """Return the median, over the same steps, of the ratio of ``figures``; None if a variant is missing or failed."""
    if ours is None or theirs is None or ours.failure or theirs.failure:
        return None
    pairs = list(zip(figures(ours), figures(theirs), strict=True))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def _seconds(measured: VariantMeasurements) -> list[float]:
    return [step.seconds for step in measured.timed]


def _seconds_per_flop(measured: VariantMeasurements) -> list[float]:
    return [seconds / flops for seconds, flops in measured.seconds_and_flops]


def _peak(measured: VariantMeasurements) -> list[float]:
    return [] if measured.memory is None else [float(measured.memory.peak)]
