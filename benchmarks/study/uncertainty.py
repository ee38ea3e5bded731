"""Intervals that cover both seeds and prompts.

Every seed of a cell is measured on the same prompts. So there are two crossed random factors, with one number for each
pair: ``y[s, p] = mean + seed[s] + prompt[p] + rest[s, p]``. The variance of the mean is estimated from the mean squares
of the two-way analysis of variance,

    (MS_seeds + MS_prompts - MS_rest) / (seeds * prompts),

where a negative component counts as 0. The interval uses Student's t with the degrees of freedom of Satterthwaite
(1946, Biometrics Bulletin 2(6), 110-114). If three seeds differ, the interval is therefore as wide as three seeds
warrant; resampling three seeds would make it too narrow. A figure that is not a mean over prompts (the worst language,
kappa) is replaced by its jackknife pseudo-values, ``N f(all) - (N - 1) f(all but p)`` (Efron and Tibshirani 1993,
chapter 11). The pseudo-values of a mean are the numbers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import scipy.stats
import torch
from torch import Tensor

from lightning_mlc.evaluation.reporting.bootstrap import LEVEL, IntervalEstimate, Statistic


class SeedFigure(NamedTuple):
    """A figure of S seeds on N prompts."""

    values: Tensor
    """(S,) float64: value of each seed."""
    parts: Tensor
    """(S, N) float64: pseudo-value of each seed and prompt."""

    def minus(self, other: SeedFigure) -> SeedFigure:
        """Return the difference from the figure of another cell, for each seed and prompt.

        If the other cell has one seed, as the model before training has, it is subtracted from every seed.
        """
        return SeedFigure(self.values - other.values, self.parts - other.parts)


def seed_figures(statistics: list[Statistic], prompts: int) -> dict[str, SeedFigure]:
    """Return every figure of ``statistics``, one for each seed; each takes weights (R, N) of N ``prompts``."""
    once = torch.ones(1, prompts, dtype=torch.float64)
    without = 1 - torch.eye(prompts, dtype=torch.float64)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for statistic in statistics:
        whole: Mapping[str, Tensor] = statistic(once)
        left: Mapping[str, Tensor] = statistic(without)
        for name, value in whole.items():
            parts = prompts * value - (prompts - 1) * left[name]
            found.setdefault(name, []).append((value[0], parts))
    return {
        name: SeedFigure(torch.stack([v for v, _ in seeds]).double(), torch.stack([p for _, p in seeds]).double())
        for name, seeds in found.items()
    }


def interval(found: SeedFigure) -> IntervalEstimate:
    """Return the mean over seeds with its interval; its ends are NaN if a pseudo-value is NaN or there is only one."""
    value = float(found.values.mean())
    variance, freedom = _variance_of_mean(found)
    if not math.isfinite(variance):
        return IntervalEstimate(value, math.nan, math.nan)
    half = 0.0 if variance <= 0 else math.sqrt(variance) * student_quantile(LEVEL, freedom)
    return IntervalEstimate(value, value - half, value + half)


def _variance_of_mean(found: SeedFigure) -> tuple[float, float]:
    """Return the variance and its degrees of freedom."""
    seeds, prompts = found.parts.shape
    if seeds == 1:
        return (float(found.parts[0].var()) / prompts, prompts - 1) if prompts > 1 else (math.nan, 0)
    mean, by_seed, by_prompt = found.parts.mean(), found.parts.mean(1), found.parts.mean(0)
    rest = found.parts - by_seed[:, None] - by_prompt[None, :] + mean
    freedoms = (seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1))
    squares = (
        prompts * float((by_seed - mean).square().sum()) / freedoms[0],
        seeds * float((by_prompt - mean).square().sum()) / freedoms[1],
        float(rest.square().sum()) / freedoms[2],
    )
    of_seeds, of_prompts, of_rest = squares
    if not all(math.isfinite(square) for square in squares):
        return math.nan, 0
    if of_seeds <= of_rest and of_seeds <= of_prompts:  # seeds make no difference
        total, freedom = of_prompts, float(freedoms[1])
    elif of_prompts <= of_rest:  # prompts make no difference
        total, freedom = of_seeds, float(freedoms[0])
    else:
        total = of_seeds + of_prompts - of_rest
        spread = sum(square**2 / own for square, own in zip(squares, freedoms, strict=True))
        freedom = max(1.0, total**2 / spread)
    return total / (seeds * prompts), freedom


def student_quantile(level: float, freedom: float) -> float:
    """Return the t for which Student's distribution with ``freedom`` degrees has ``level`` between -t and t."""
    return float(scipy.stats.t.ppf((1 + level) / 2, freedom))
