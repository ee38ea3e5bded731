"""From samples to figures with confidence intervals.

An :class:`EvaluationSample` is one measure of one model on one prompt set: a number for each prompt and language.
Figures are made from samples alone, so every measure has the same summaries, intervals and comparisons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.evaluation.reporting.bootstrap import IntervalEstimate, draws, estimate, widen_certainty
from lightning_mlc.evaluation.reporting.measures import AGREEMENT, EvaluationMeasure
from lightning_mlc.metrics.verdicts import MISSING, across_languages, agreement, language_means

SUMMARIES = ("mean", "worst", "spread", "variance", "seen", "unseen")
"""Scopes that are no language: ``seen`` and ``unseen`` are means over the languages of training and the others."""

LEANING = ("worst", "spread", "variance")
"""Scopes whose figures lean to one side in a sample: see `bootstrap`."""


@dataclass(frozen=True)
class Subject:
    """Whose numbers they are: a model on a prompt set."""

    model: str
    set: str
    languages: tuple[str, ...]
    """The L languages of the set."""
    seen: tuple[str, ...] | None
    """Languages that the model was trained on, None where that is not known."""


@dataclass(frozen=True)
class EvaluationSample:
    """Numbers of one measure, for N prompts in L languages."""

    subject: Subject
    judge: str
    """Where the numbers come from."""
    measure: EvaluationMeasure
    values: Tensor
    """(N, L) float64."""
    present: Tensor
    """(N, L) bool, where there is a number."""

    @classmethod
    def of(cls, subject: Subject, judge: str, measure: EvaluationMeasure, values: Tensor) -> EvaluationSample:
        """From ``values`` (N, L) that are NaN where there is none."""
        present = ~values.isnan()
        return cls(subject, judge, measure, torch.where(present, values.double(), 0.0), present)


@dataclass(frozen=True)
class Figure:
    """A number of the report."""

    model: str
    set: str
    judge: str
    measure: str
    scope: str
    """A language, one of ``SUMMARIES``, or ``all`` for agreement between languages."""
    value: float
    low: float
    high: float
    count: int
    """Samples that it rests on."""
    baseline: str | None = None
    """In a comparison, the model that ``model`` is compared with: ``value`` is the difference."""
    better: int | None = None
    """In a comparison of shares, how often ``model`` alone had the better outcome."""
    worse: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without what does not apply."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def figures_of(sample: EvaluationSample, replicates: int, seed: int) -> Iterator[Figure]:
    """Each language of ``sample`` and the summaries over languages."""
    weights = draws(len(sample.values), replicates, seed)
    found = estimate(lambda weights: _scopes(sample, weights), weights, LEANING)
    for scope, value in found.items():
        count = _count(sample, scope)
        if scope in LEANING:
            least = -math.inf if scope == "worst" and not sample.measure.is_share else 0.0
            most = 1.0 if sample.measure.is_share else math.inf  # what a figure cannot be is in no interval
            value = IntervalEstimate(value.value, *(min(max(end, least), most) for end in (value.low, value.high)))
        if sample.measure.is_share and scope not in ("spread", "variance"):
            value = _widened(sample, scope, value)
        yield _figure(sample, sample.measure.name, scope, value, count)


def _widened(sample: EvaluationSample, scope: str, value: IntervalEstimate) -> IntervalEstimate:
    """A share of ``scope`` that is 0 or 1 with its exact interval, from those of its languages.

    The end of a mean is the mean of theirs: were it wrong, one of theirs would be too, and one language alone is enough
    of a chance. The worst takes that of the language with the fewest prompts, of those that are as bad.
    """
    inside = sample.present.any(0)
    if scope in ("seen", "unseen") and sample.subject.seen is not None:
        seen = torch.tensor([language in sample.subject.seen for language in sample.subject.languages])
        inside &= seen if scope == "seen" else ~seen
    elif scope in sample.subject.languages:
        inside &= torch.tensor([language == scope for language in sample.subject.languages])
    counts = sample.present.sum(0)
    if scope == "worst":
        inside &= sample.values.sum(0) / counts.clamp_min(1) == value.value
        counts = torch.full_like(counts, int(counts[inside].min())) if bool(inside.any()) else counts
    own = [widen_certainty(value, count) for count in counts[inside].tolist()]
    ends = ([one.low for one in own], [one.high for one in own])
    return IntervalEstimate(value.value, *(sum(end) / len(end) for end in ends)) if own else value


def agreement_of(labels: Tensor, subject: Subject, judge: str, replicates: int, seed: int) -> Iterator[Figure]:
    """``pag`` and ``kappa`` of ``labels`` (N, L)."""
    weights = draws(len(labels), replicates, seed)
    count = int(((labels != MISSING).sum(1) >= 2).sum())
    for name, value in estimate(lambda weights: agreement(labels, weights), weights).items():
        if count:
            value = widen_certainty(value, count) if name == AGREEMENT.name else value
            yield Figure(subject.model, subject.set, judge, name, "all", *value, count)


def agreement_comparisons_of(
    labels: Tensor, baseline: Tensor, subject: Subject, against: str, judge: str, replicates: int, seed: int
) -> Iterator[Figure]:
    """``pag`` and ``kappa`` of ``labels`` (N, L) minus those of the model ``against``, where both have labels."""
    both = (labels != MISSING) & (baseline != MISSING)
    ours, theirs = (torch.where(both, own, MISSING) for own in (labels, baseline))
    count = int((both.sum(1) >= 2).sum())
    if not count:
        return

    def difference(weights: Tensor) -> dict[str, Tensor]:
        first, second = agreement(ours, weights), agreement(theirs, weights)
        return {name: first[name] - second[name] for name in first}

    for name, value in estimate(difference, draws(len(labels), replicates, seed)).items():
        yield Figure(subject.model, subject.set, judge, name, "all", *value, count, baseline=against)


def comparisons_of(
    sample: EvaluationSample, baseline: EvaluationSample, replicates: int, seed: int
) -> Iterator[Figure]:
    """``sample`` minus ``baseline`` on the prompts and languages that both have, drawn together."""
    both = sample.present & baseline.present
    ours, theirs = (
        dataclasses.replace(part, present=both, subject=dataclasses.replace(part.subject, seen=None))
        for part in (sample, baseline)
    )
    if not both.any():
        return

    def difference(weights: Tensor) -> dict[str, Tensor]:
        first, second = _scopes(ours, weights), _scopes(theirs, weights)
        return {scope: first[scope] - second[scope] for scope in first}

    for scope, value in estimate(difference, draws(len(both), replicates, seed), LEANING).items():
        better = worse = None
        if sample.measure.is_share and scope in sample.subject.languages:
            column = sample.subject.languages.index(scope)
            change = (sample.values - baseline.values)[both[:, column], column]
            ups, downs = int((change > 0).sum()), int((change < 0).sum())
            better, worse = (ups, downs) if sample.measure.higher_is_better else (downs, ups)
        figure = _figure(ours, sample.measure.name, scope, value, _count(ours, scope))
        yield dataclasses.replace(figure, baseline=baseline.subject.model, better=better, worse=worse)


def _scopes(sample: EvaluationSample, weights: Tensor) -> dict[str, Tensor]:
    means = language_means(sample.values, sample.present, weights)
    there = sample.present.any(0)
    results = {language: means[:, i] for i, language in enumerate(sample.subject.languages) if bool(there[i])}
    over = across_languages(means, sample.measure.higher_is_better)
    results |= {scope: over[scope] for scope in ("mean", "worst", "spread", "variance")}
    if sample.subject.seen is not None:
        for scope, wanted in (("seen", True), ("unseen", False)):
            columns = [
                i for i, language in enumerate(sample.subject.languages) if (language in sample.subject.seen) == wanted
            ]
            if bool(there[columns].any()):
                results[scope] = means[:, columns].nanmean(1)
    return results


def _count(sample: EvaluationSample, scope: str) -> int:
    if scope in sample.subject.languages:
        return int(sample.present[:, sample.subject.languages.index(scope)].sum())
    if scope in ("seen", "unseen") and sample.subject.seen is not None:
        inside = torch.tensor(
            [(language in sample.subject.seen) == (scope == "seen") for language in sample.subject.languages]
        )
        return int(sample.present[:, inside].sum())
    return int(sample.present.sum())


def _figure(sample: EvaluationSample, measure: str, scope: str, value: IntervalEstimate, count: int) -> Figure:
    return Figure(sample.subject.model, sample.subject.set, sample.judge, measure, scope, *value, count)
