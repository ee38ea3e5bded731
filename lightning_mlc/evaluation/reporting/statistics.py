"""Computes figures with confidence intervals from samples.

An :class:`EvaluationSample` is one measure of one model on one prompt set: a number for each prompt and language.
Figures are computed from samples only, so every measure has the same summaries, intervals and comparisons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.evaluation.reporting.bootstrap import IntervalEstimate, estimate, resampling_weights, widen_certainty
from lightning_mlc.evaluation.reporting.measures import AGREEMENT, EvaluationMeasure
from lightning_mlc.metrics.verdicts import MISSING, across_languages, agreement, language_means

SUMMARIES = ("mean", "worst", "spread", "variance", "seen", "unseen")
"""Scopes over several languages. ``seen`` is the mean over the languages of training, ``unseen`` over the others."""

BIASED = ("worst", "spread", "variance")
"""Scopes whose figures are biased in a sample, see :mod:`lightning_mlc.evaluation.reporting.bootstrap`."""


@dataclass(frozen=True)
class Subject:
    """A model and the prompt set that it is measured on."""

    model: str
    set: str
    languages: tuple[str, ...]
    """The L languages of the set."""
    seen: tuple[str, ...] | None
    """Languages that the model was trained on; None if unknown."""


@dataclass(frozen=True)
class EvaluationSample:
    """The numbers of one measure, for N prompts in L languages."""

    subject: Subject
    judge: str
    """The judge that gave the numbers, or ``margin`` or ``chosen and rejected`` for likelihoods."""
    measure: EvaluationMeasure
    values: Tensor
    """(N, L) float64: the numbers, or 0 where none exists."""
    present: Tensor
    """(N, L) bool: whether a number exists."""

    @classmethod
    def of(cls, subject: Subject, judge: str, measure: EvaluationMeasure, values: Tensor) -> EvaluationSample:
        """Make a sample from ``values`` (N, L), which are NaN where no number exists."""
        present = ~values.isnan()
        return cls(subject, judge, measure, torch.where(present, values.double(), 0.0), present)


@dataclass(frozen=True)
class Figure:
    """A number of the report, with its interval."""

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
    """Number of prompts, in all languages of the scope, that it is computed from."""
    baseline: str | None = None
    """In a comparison, the model that ``model`` is compared with: ``value`` is the difference."""
    better: int | None = None
    """In a comparison of shares, the number of prompts for which ``model`` had the better outcome."""
    worse: int | None = None
    """The same for the worse outcome."""
    kinds: tuple[int, int] | None = None
    """Where harmful prompts are compared with ordinary ones, the number of each kind. ``value`` is NaN if they are too
    few."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those that are None."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def figures_of(sample: EvaluationSample, replicates: int, seed: int) -> Iterator[Figure]:
    """The figures of each language of ``sample``, and the summaries over languages."""
    weights = resampling_weights(len(sample.values), replicates, seed)
    found = estimate(lambda weights: _scope_values(sample, weights), weights, BIASED)
    for scope, value in found.items():
        count = _count(sample, scope)
        if scope in BIASED:
            least = -math.inf if scope == "worst" and not sample.measure.is_share else 0.0
            most = 1.0 if sample.measure.is_share else math.inf  # no interval goes beyond possible values
            value = IntervalEstimate(value.value, *(min(max(end, least), most) for end in (value.low, value.high)))
        if sample.measure.is_share and scope not in ("spread", "variance"):
            value = _with_exact_interval(sample, scope, value)
        yield _figure(sample, sample.measure.name, scope, value, count)


def _with_exact_interval(sample: EvaluationSample, scope: str, value: IntervalEstimate) -> IntervalEstimate:
    """Give a share of 0 or 1 in ``scope`` an exact interval, which is made from those of its languages.

    The ends for a mean over languages are the means of the languages' ends: if the true mean were beyond them, the true
    share of at least one language would be beyond its own ends. For the worst language, the interval is that of the
    language with the fewest prompts among those that are equally bad.
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
    """The figures ``pag`` and ``kappa`` of ``labels`` (N, L)."""
    weights = resampling_weights(len(labels), replicates, seed)
    count = int(((labels != MISSING).sum(1) >= 2).sum())
    for name, value in estimate(lambda weights: agreement(labels, weights), weights).items():
        if count:
            value = widen_certainty(value, count) if name == AGREEMENT.name else value
            yield Figure(subject.model, subject.set, judge, name, "all", *value, count)


def agreement_comparisons_of(
    labels: Tensor, baseline: Tensor, subject: Subject, against: str, judge: str, replicates: int, seed: int
) -> Iterator[Figure]:
    """``pag`` and ``kappa`` of ``labels`` (N, L) minus those of ``baseline``, the labels of the model ``against``.

    Only prompts and languages for which both have labels are compared.
    """
    both = (labels != MISSING) & (baseline != MISSING)
    ours, theirs = (torch.where(both, own, MISSING) for own in (labels, baseline))
    count = int((both.sum(1) >= 2).sum())
    if not count:
        return

    def difference(weights: Tensor) -> dict[str, Tensor]:
        first, second = agreement(ours, weights), agreement(theirs, weights)
        return {name: first[name] - second[name] for name in first}

    for name, value in estimate(difference, resampling_weights(len(labels), replicates, seed)).items():
        yield Figure(subject.model, subject.set, judge, name, "all", *value, count, baseline=against)


def comparisons_of(
    sample: EvaluationSample, baseline: EvaluationSample, replicates: int, seed: int
) -> Iterator[Figure]:
    """``sample`` minus ``baseline`` on the prompts and languages that both have, with the same resamples."""
    both = sample.present & baseline.present
    ours, theirs = (
        dataclasses.replace(part, present=both, subject=dataclasses.replace(part.subject, seen=None))
        for part in (sample, baseline)
    )
    if not both.any():
        return

    def difference(weights: Tensor) -> dict[str, Tensor]:
        first, second = _scope_values(ours, weights), _scope_values(theirs, weights)
        return {scope: first[scope] - second[scope] for scope in first}

    for scope, value in estimate(difference, resampling_weights(len(both), replicates, seed), BIASED).items():
        better = worse = None
        if sample.measure.is_share and scope in sample.subject.languages:
            column = sample.subject.languages.index(scope)
            change = (sample.values - baseline.values)[both[:, column], column]
            ups, downs = int((change > 0).sum()), int((change < 0).sum())
            better, worse = (ups, downs) if sample.measure.higher_is_better else (downs, ups)
        figure = _figure(ours, sample.measure.name, scope, value, _count(ours, scope))
        yield dataclasses.replace(figure, baseline=baseline.subject.model, better=better, worse=worse)


def _scope_values(sample: EvaluationSample, weights: Tensor) -> dict[str, Tensor]:
    means = language_means(sample.values, sample.present, weights)
    return by_scope(means, sample.present.any(0), sample.subject, sample.measure.higher_is_better)


def by_scope(means: Tensor, there: Tensor, subject: Subject, higher_is_better: bool) -> dict[str, Tensor]:
    """The figures of languages and of summaries over them.

    Args:
        means: (R, L): figure of each language of ``subject``, NaN where there is none.
        there: (L,) bool: languages that have a figure.
        subject: The model and the prompt set.
        higher_is_better: Whether the worst language is the one with the lowest figure.

    Returns:
        (R,) each, by scope.
    """
    results = {language: means[:, i] for i, language in enumerate(subject.languages) if bool(there[i])}
    over = across_languages(means, higher_is_better)
    results |= {scope: over[scope] for scope in ("mean", "worst", "spread", "variance")}
    if subject.seen is not None:
        for scope, wanted in (("seen", True), ("unseen", False)):
            columns = [i for i, language in enumerate(subject.languages) if (language in subject.seen) == wanted]
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
