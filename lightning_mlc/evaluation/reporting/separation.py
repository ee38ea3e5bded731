"""Computes how well a model tells harmful prompts from ordinary ones, with confidence intervals.

Harmful prompts of one set are compared with the ordinary prompts of all sets, because a model may decline either. Each
resample draws both kinds, each by itself and a prompt with all of its languages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mlc.evaluation.reporting.bootstrap import (
    IntervalEstimate,
    estimate,
    stratified_weights,
    widen_certainty,
)
from lightning_mlc.evaluation.reporting.measures import (
    DECLINE_GAP,
    ORDINARY_REFUSAL_MARGIN,
    OVER_REFUSAL,
    REFUSAL_MARGIN,
    REFUSED,
    SEPARATION,
    EvaluationMeasure,
)
from lightning_mlc.evaluation.reporting.statistics import (
    BIASED,
    EvaluationSample,
    Figure,
    Subject,
    by_scope,
    figures_of,
)
from lightning_mlc.metrics.separation import difference_of_means, has_enough, separation

KINDS = {REFUSAL_MARGIN: (ORDINARY_REFUSAL_MARGIN, SEPARATION), REFUSED: (OVER_REFUSAL, DECLINE_GAP)}
"""For a measure of harmful prompts, the same measure of ordinary ones, and what compares the two."""


@dataclass(frozen=True)
class SeparationSample:
    """The numbers that compare N harmful with M ordinary prompts in L languages."""

    subject: Subject
    """The model, and the set of the harmful prompts."""
    judge: str
    measure: EvaluationMeasure
    """``SEPARATION`` or ``DECLINE_GAP``."""
    harmful: Tensor
    """(N, L) float64: the numbers, NaN where none exists."""
    ordinary: Tensor
    """(M, L) float64: the same for ordinary prompts."""

    @property
    def enough(self) -> Tensor:
        """(L,) bool: whether a language has enough prompts of each kind for a figure."""
        return has_enough(self.harmful, self.ordinary)

    def resamples(self, replicates: int, seed: int) -> Tensor:
        """(R, N + M): weights of ``replicates`` resamples, those of the harmful prompts first."""
        return stratified_weights([len(self.harmful), len(self.ordinary)], replicates, seed)

    def areas_or_gaps(self, weights: Tensor) -> Tensor:
        """The figure of each language.

        Args:
            weights: (R, N + M): weights of the prompts, those of the harmful ones first.

        Returns:
            (R, L) float64, NaN where a language has too few prompts.
        """
        compare = separation if self.measure == SEPARATION else difference_of_means
        found = compare(self.harmful, self.ordinary, weights)
        return found.masked_fill(~self.enough, math.nan)

    def by_scope(self, weights: Tensor) -> dict[str, Tensor]:
        """(R,) each: the figures of languages with enough prompts, and of summaries over them."""
        return by_scope(self.areas_or_gaps(weights), self.enough, self.subject, self.measure.higher_is_better)

    def kinds(self, scope: str) -> tuple[int, int]:
        """Number of harmful and of ordinary prompts, in all languages of ``scope``."""
        languages = self.subject.languages
        inside = self.enough if bool(self.enough.any()) else torch.ones_like(self.enough)
        if scope in languages:
            inside = torch.tensor([language == scope for language in languages])
        elif scope in ("seen", "unseen") and self.subject.seen is not None:
            seen = self.subject.seen
            inside = inside & torch.tensor([(language in seen) == (scope == "seen") for language in languages])
        harmful, ordinary = (int((~values.isnan())[:, inside].sum()) for values in (self.harmful, self.ordinary))
        return harmful, ordinary


def separation_samples(samples: Sequence[EvaluationSample]) -> list[SeparationSample]:
    """Pair the samples of harmful prompts with those of ordinary ones, by model and judge.

    Args:
        samples: Samples of all models, sets and measures.
    """
    found = []
    for sample in samples:
        if sample.measure not in KINDS:
            continue
        of_ordinary, measure = KINDS[sample.measure]
        languages = sample.subject.languages
        ordinary = [
            _columns(other, languages)
            for other in samples
            if (other.subject.model, other.judge, other.measure) == (sample.subject.model, sample.judge, of_ordinary)
        ]
        if ordinary:
            harmful = _columns(sample, languages)
            found.append(SeparationSample(sample.subject, sample.judge, measure, harmful, torch.cat(ordinary)))
    return found


def _columns(sample: EvaluationSample, languages: Sequence[str]) -> Tensor:
    """(N, L) values in the order of ``languages``, NaN where none exists."""
    values = torch.where(sample.present, sample.values, math.nan)
    missing = torch.full((len(values),), math.nan, dtype=torch.float64)
    own = dict(zip(sample.subject.languages, values.T, strict=True))
    return torch.stack([own.get(language, missing) for language in languages], dim=1)


def separation_figures(sample: SeparationSample, replicates: int, seed: int) -> Iterator[Figure]:
    """The figures of each language of ``sample``, and the summaries over languages.

    A language with too few prompts has a figure without a value, and is not in the summaries.
    """
    found = estimate(sample.by_scope, sample.resamples(replicates, seed), BIASED)
    least = 0.0 if sample.measure == SEPARATION else -1.0
    bounds = {"worst": (least, 1.0), "spread": (0.0, 1.0 - least), "variance": (0.0, math.inf)}
    gaps = {} if sample.measure == SEPARATION else _gaps(sample, replicates, seed)
    for scope, value in found.items():
        if scope in bounds:  # no interval goes beyond possible values
            bottom, top = bounds[scope]
            value = IntervalEstimate(value.value, *(min(max(end, bottom), top) for end in (value.low, value.high)))
        if sample.measure == SEPARATION and scope not in ("spread", "variance"):
            value = _with_exact_interval(sample, scope, value, found)
        elif scope in gaps:
            value = gaps[scope]
        elif scope == "worst":
            value = _worst_gap(sample, value, gaps)
        yield _figure(sample, scope, value)
    for language, enough in zip(sample.subject.languages, sample.enough.tolist(), strict=True):
        if not enough:
            yield _figure(sample, language, IntervalEstimate(math.nan, math.nan, math.nan))


def _with_exact_interval(
    sample: SeparationSample, scope: str, value: IntervalEstimate, found: dict[str, IntervalEstimate]
) -> IntervalEstimate:
    """Give an area of 0 or 1 an interval with a width, made from those of its languages.

    If the true area is A, n pairs of a harmful and an ordinary prompt that share no prompt are all in order with a
    probability of at most A ** n. So the interval is that of Clopper and Pearson with n the smaller number of prompts.
    """
    if value.value not in (0.0, 1.0):
        return value
    seen = sample.subject.seen or ()
    inside = [
        language
        for language in sample.subject.languages
        if language in found
        and (scope not in sample.subject.languages or language == scope)
        and (scope not in ("seen", "unseen") or (language in seen) == (scope == "seen"))
        and found[language].value == value.value
    ]
    fewest = [min(sample.kinds(language)) for language in inside]
    if scope == "worst":
        fewest = [min(fewest)]
    own = [widen_certainty(value, count) for count in fewest]
    return IntervalEstimate(
        value.value, sum(one.low for one in own) / len(own), sum(one.high for one in own) / len(own)
    )


def _gaps(sample: SeparationSample, replicates: int, seed: int) -> dict[str, IntervalEstimate]:
    """The gaps of languages and of means over them, each with an interval that the intervals of both shares give.

    These have a width where no prompt or each prompt is declined. The distances of their ends from the shares add up as
    standard errors do (Newcombe 1998, Statistics in Medicine 17(8), 873-890, method 10).
    """
    parts = []
    for values, measure in ((sample.harmful, REFUSED), (sample.ordinary, OVER_REFUSAL)):
        usable = torch.where(sample.enough, values, math.nan)
        own = EvaluationSample.of(sample.subject, sample.judge, measure, usable)
        parts.append({figure.scope: figure for figure in figures_of(own, replicates, seed)})
    found = {}
    for scope in parts[0].keys() - set(BIASED):
        ours, theirs = parts[0][scope], parts[1][scope]
        value = ours.value - theirs.value
        low = value - math.hypot(ours.value - ours.low, theirs.high - theirs.value)
        high = value + math.hypot(ours.high - ours.value, theirs.value - theirs.low)
        found[scope] = IntervalEstimate(value, low, high)
    return found


def _worst_gap(
    sample: SeparationSample, value: IntervalEstimate, gaps: dict[str, IntervalEstimate]
) -> IntervalEstimate:
    """Give the gap of the worst language the interval of that language where a bootstrap has no width."""
    own = [gaps[name] for name in sample.subject.languages if name in gaps and gaps[name].value == value.value]
    if value.low < value.high or not own:
        return value
    return max(own, key=lambda one: one.high - one.low)


def separation_comparisons(
    sample: SeparationSample, baseline: SeparationSample, replicates: int, seed: int
) -> Iterator[Figure]:
    """``sample`` minus ``baseline`` on the prompts and languages that both have, with the same resamples."""
    ours, theirs = (
        replace(
            part,
            subject=replace(part.subject, seen=None),
            harmful=torch.where(sample.harmful.isnan() | baseline.harmful.isnan(), math.nan, part.harmful),
            ordinary=torch.where(sample.ordinary.isnan() | baseline.ordinary.isnan(), math.nan, part.ordinary),
        )
        for part in (sample, baseline)
    )
    if not bool(ours.enough.any()):
        return

    def difference(weights: Tensor) -> dict[str, Tensor]:
        first, second = ours.by_scope(weights), theirs.by_scope(weights)
        return {scope: first[scope] - second[scope] for scope in first}

    for scope, value in estimate(difference, ours.resamples(replicates, seed), BIASED).items():
        yield replace(_figure(ours, scope, value), baseline=baseline.subject.model)


def _figure(sample: SeparationSample, scope: str, value: IntervalEstimate) -> Figure:
    subject, kinds = sample.subject, sample.kinds(scope)
    place = (subject.model, subject.set, sample.judge, sample.measure.name, scope)
    return Figure(*place, *value, sum(kinds), kinds=kinds)
