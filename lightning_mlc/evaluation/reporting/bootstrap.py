"""Confidence intervals by resampling prompts.

The prompts are the sample: its languages belong together, so a prompt is drawn with all of them, and all models
are compared on the same draws. Intervals are percentiles of the draws (Efron and Tibshirani 1993, chapter 13), or,
for figures that lean to one side, the basic intervals (Davison and Hinkley 1997, section 5.2): the worst of ten
languages is worse in a sample than in truth, in a resample worse still, and by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Statistic = Callable[[Tensor], Mapping[str, Tensor]]
"""From weights (R, N) of N prompts to results of (R,) each."""

LEVEL = 0.95
"""Coverage of an interval."""


class IntervalEstimate(NamedTuple):
    """A figure with its interval."""

    value: float
    low: float
    high: float


def draws(prompts: int, replicates: int, seed: int) -> Tensor:
    """(R, N) float64: how often each of N prompts is drawn in each of R resamples of N."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(max(1, prompts), (replicates, prompts), generator=generator)
    return torch.zeros(replicates, prompts, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(replicates, prompts, dtype=torch.float64)
    )


def estimate(statistic: Statistic, weights: Tensor, leaning: Collection[str] = ()) -> dict[str, IntervalEstimate]:
    """Each result of ``statistic`` on the data, with its interval over resamples ``weights`` (R, N).

    Results that are called one of ``leaning`` get basic intervals, which may leave out the value itself. Resamples in
    which a result is undefined (a language none of whose prompts was drawn) take no part in it.
    """
    once = torch.ones(1, weights.shape[1], dtype=torch.float64)
    values, resampled = statistic(once), statistic(weights)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found = {}
    for name, value in values.items():
        low, high = resampled[name].double().nanquantile(ends).tolist()
        own = float(value[0])
        found[name] = (
            IntervalEstimate(own, 2 * own - high, 2 * own - low)
            if name in leaning
            else IntervalEstimate(own, low, high)
        )
    return found


def widen_certainty(found: IntervalEstimate, prompts: int) -> IntervalEstimate:
    """A share of 0 or 1 with the exact interval of Clopper and Pearson (1934) in the place of a width of 0.

    A bootstrap cannot draw what it has not seen: twenty safe responses out of twenty would be called certain.
    """
    if prompts == 0 or found.value not in (0.0, 1.0):
        return found
    bound = ((1 - LEVEL) / 2) ** (1 / prompts)
    return IntervalEstimate(0.0, 0.0, 1 - bound) if found.value == 0.0 else IntervalEstimate(1.0, bound, 1.0)
