"""Confidence intervals by resampling prompts.

The languages of a prompt belong together, so each resample draws prompts with all of their languages, and all models
are compared on the same resamples. Most intervals are percentile intervals (Efron and Tibshirani 1993, chapter 13).
Figures that are biased in a sample get basic intervals (Davison and Hinkley 1997, section 5.2). For example, the worst
of ten languages looks worse in a sample than it is. In a resample it looks worse again, by about the same amount.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Statistic = Callable[[Tensor], Mapping[str, Tensor]]
"""Takes weights (R, N) of N prompts, and returns named results of shape (R,)."""

LEVEL = 0.95
"""Confidence level of all intervals."""


class IntervalEstimate(NamedTuple):
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float


def resampling_weights(prompts: int, replicates: int, seed: int) -> Tensor:
    """Draw resamples of the prompts, with replacement.

    Args:
        prompts: Number N of prompts, which is also the size of a resample.
        replicates: Number R of resamples.
        seed: Seed of the draws.

    Returns:
        (R, N) float64: how often each resample contains each prompt.
    """
    return stratified_weights([prompts], replicates, seed)


def stratified_weights(strata: Sequence[int], replicates: int, seed: int) -> Tensor:
    """Draw resamples of several strata of prompts, such as harmful and ordinary ones, each by itself.

    Args:
        strata: Number of prompts in each stratum, N in all. Every resample has as many of each.
        replicates: Number R of resamples.
        seed: Seed of the draws.

    Returns:
        (R, N) float64: how often each resample contains each prompt, stratum by stratum.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for prompts in strata:
        chosen = torch.randint(max(1, prompts), (replicates, prompts), generator=generator)
        drawn = torch.zeros(replicates, prompts, dtype=torch.float64)
        weights.append(drawn.scatter_add_(1, chosen, torch.ones_like(drawn)))
    return torch.cat(weights, dim=1)


def estimate(statistic: Statistic, weights: Tensor, biased: Collection[str] = ()) -> dict[str, IntervalEstimate]:
    """Each result of ``statistic``, with its interval.

    A resample in which a result is undefined, because it has no prompt in some language, is left out for this result.

    Args:
        statistic: Computes the results from weights of the prompts.
        weights: (R, N): R resamples of N prompts.
        biased: Names of results that are biased in a sample. They get basic intervals, which may leave out the value.

    Returns:
        The estimates, by the names that ``statistic`` gives them.
    """
    once = torch.ones(1, weights.shape[1], dtype=torch.float64)
    values, resampled = statistic(once), statistic(weights)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found = {}
    for name, value in values.items():
        low, high = resampled[name].double().nanquantile(ends).tolist()
        own = float(value[0])
        found[name] = (
            IntervalEstimate(own, 2 * own - high, 2 * own - low) if name in biased else IntervalEstimate(own, low, high)
        )
    return found


def widen_certainty(found: IntervalEstimate, prompts: int) -> IntervalEstimate:
    """Give a share of 0 or 1 the exact interval of Clopper and Pearson (1934); other figures stay as they are.

    A bootstrap cannot draw an outcome that the sample does not contain, so it would give twenty safe responses out of
    twenty an interval of width 0.
    """
    if prompts == 0 or found.value not in (0.0, 1.0):
        return found
    bound = ((1 - LEVEL) / 2) ** (1 / prompts)
    return IntervalEstimate(0.0, 0.0, 1 - bound) if found.value == 0.0 else IntervalEstimate(1.0, bound, 1.0)
