"""Intervals against closed forms; comparisons; seen and unseen languages."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lightning_mlc.evaluation.reporting import measures, statistics
from lightning_mlc.evaluation.reporting.bootstrap import IntervalEstimate, estimate, resampling_weights, widen_certainty
from lightning_mlc.evaluation.reporting.measures import EvaluationMeasure
from lightning_mlc.evaluation.reporting.statistics import (
    EvaluationSample,
    Figure,
    Subject,
    agreement_of,
    comparisons_of,
    figures_of,
)
from lightning_mlc.metrics.verdicts import MISSING, language_means

NAN = math.nan


def share(values: torch.Tensor) -> dict[str, IntervalEstimate]:
    return estimate(
        lambda weights: {"share": language_means(values[:, None], torch.ones(len(values), 1).bool(), weights)[:, 0]},
        resampling_weights(len(values), 1000, seed=1),
    )


def test_draws_are_resamples() -> None:
    weights = resampling_weights(7, 500, seed=3)
    assert weights.shape == (500, 7)
    assert (weights.sum(1) == 7).all()
    assert weights.mean() == 1
    # Each count is binomial(7, 1/7): variance 6/7.
    assert float(weights.var()) == pytest.approx(6 / 7, rel=0.06)  # of 3500 counts
    assert torch.equal(weights, resampling_weights(7, 500, seed=3))
    assert not torch.equal(weights, resampling_weights(7, 500, seed=4))
    assert resampling_weights(0, 3, seed=0).shape == (3, 0)


def test_width_is_that_of_the_standard_error() -> None:
    values = torch.zeros(200, dtype=torch.float64)
    values[:60] = 1
    found = share(values)["share"]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert found.value == pytest.approx(0.3)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)  # of 1000 resamples, in steps of 1/200
    assert (found.low + found.high) / 2 == pytest.approx(0.3, abs=0.01)


def test_intervals_cover_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        found = share((torch.rand(100, generator=generator) < 0.7).double())["share"]
        covered += found.low <= 0.7 <= found.high
    # The percentile interval of 100 binary samples covers about 94 %; the standard error of 400 trials is 1.2 %.
    assert 0.905 <= covered / 400 <= 0.975


@pytest.mark.parametrize("prompts", [1, 12, 180])
def test_what_was_never_seen_is_not_certain(prompts: int) -> None:
    """The lower end of Clopper and Pearson's interval is the share p for which n successes in n have probability
    2.5 %."""
    widened = widen_certainty(share(torch.ones(prompts, dtype=torch.float64))["share"], prompts)
    assert widened.value == widened.high == 1
    assert widened.low**prompts == pytest.approx(0.025)
    assert widen_certainty(IntervalEstimate(0.0, 0.0, 0.0), prompts).high == pytest.approx(1 - widened.low)
    assert widen_certainty(IntervalEstimate(0.5, 0.4, 0.6), prompts) == IntervalEstimate(0.5, 0.4, 0.6)


def sample(
    values: list[list[float]],
    model: str = "b",
    seen: tuple[str, ...] | None = None,
    measure: EvaluationMeasure = measures.SAFE,
) -> EvaluationSample:
    return EvaluationSample.of(Subject(model, "set", ("en", "sw", "zh"), seen), "judge", measure, torch.tensor(values))


def by_scope(found: list[Figure]) -> dict[str, Figure]:
    return {figure.scope: figure for figure in found}


def test_figures_of_every_language_and_of_those_seen_in_training() -> None:
    values = [[1.0, 0.0, 1.0], [1.0, 1.0, NAN], [0.0, 0.0, NAN], [1.0, NAN, 0.0]]
    found = by_scope(list(figures_of(sample(values, seen=("en", "zh", "fr")), 200, 0)))
    expected = {
        "en": (3 / 4, 4),
        "sw": (1 / 3, 3),
        "zh": (1 / 2, 2),
        "mean": ((3 / 4 + 1 / 3 + 1 / 2) / 3, 9),
        "worst": (1 / 3, 9),
        "spread": (3 / 4 - 1 / 3, 9),
        "seen": ((3 / 4 + 1 / 2) / 2, 6),
        "unseen": (1 / 3, 3),
    }
    assert {scope: (found[scope].value, found[scope].count) for scope in expected} == {
        scope: (pytest.approx(value), count) for scope, (value, count) in expected.items()
    }
    assert all(figure.low <= figure.value <= figure.high for figure in found.values())
    assert "seen" not in by_scope(list(figures_of(sample(values), 200, 0)))


def test_a_language_without_samples_has_no_figure() -> None:
    found = by_scope(list(figures_of(sample([[1.0, NAN, 0.0], [0.0, NAN, 0.0]]), 200, 0)))
    assert set(found) == {"en", "zh", "mean", "worst", "spread", "variance"}


def test_comparisons_are_paired_by_prompt() -> None:
    """Prompts differ a lot and models a little: their difference is significant, although the intervals overlap."""
    generator = torch.Generator().manual_seed(0)
    hard = 5 * torch.randn(60, 3, generator=generator, dtype=torch.float64)
    better = hard + 0.5 + 0.1 * torch.randn(60, 3, generator=generator, dtype=torch.float64)
    measure = measures.REFUSAL_MARGIN
    first, second = sample(hard.tolist(), "a", measure=measure), sample(better.tolist(), "b", measure=measure)
    alone = [by_scope(list(figures_of(one, 500, 0)))["mean"] for one in (first, second)]
    assert alone[0].high > alone[1].low
    found = by_scope(list(comparisons_of(second, first, 500, 0)))
    assert (found["mean"].model, found["mean"].baseline) == ("b", "a")
    assert 0.4 < found["mean"].low < found["mean"].value < found["mean"].high < 0.6
    assert found["mean"].value == pytest.approx(float((better - hard).mean()))
    assert found["en"].better is None


def test_comparisons_use_what_both_have_and_count_changes() -> None:
    first = sample([[1.0, 0.0, 0.0], [0.0, NAN, 0.0], [0.0, 1.0, 1.0]], "a")
    second = sample([[1.0, 1.0, 0.0], [1.0, 1.0, NAN], [1.0, 0.0, 1.0]], "b")
    found = by_scope(list(comparisons_of(second, first, 200, 0)))
    assert (found["en"].value, found["en"].better, found["en"].worse, found["en"].count) == (
        pytest.approx(2 / 3),
        2,
        0,
        3,
    )
    assert (found["sw"].value, found["sw"].better, found["sw"].worse, found["sw"].count) == (0, 1, 1, 2)
    assert (found["zh"].value, found["zh"].count) == (0, 2)
    worse = dataclasses.replace(second, measure=measures.UNSAFE), dataclasses.replace(first, measure=measures.UNSAFE)
    assert by_scope(list(comparisons_of(*worse, 200, 0)))["en"].worse == 2  # where higher is worse
    nothing = sample([[NAN] * 3] * 3, "a")
    assert list(comparisons_of(second, nothing, 200, 0)) == []


def test_agreement_has_an_interval_too() -> None:
    labels = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 1, -1], [-1, 1, -1]])
    found = {
        figure.measure: figure for figure in agreement_of(labels, Subject("m", "s", ("a", "b", "c"), None), "j", 300, 0)
    }
    assert found["pag"].value == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert found["pag"].count == 4
    assert found["pag"].low < found["pag"].value < found["pag"].high
    assert found["kappa"].value < found["pag"].value


def test_plain_values_leave_out_what_does_not_apply() -> None:
    figure = next(iter(figures_of(sample([[1.0, 0.0, 1.0]]), 100, 0)))
    assert set(figure.as_dict()) == {"model", "set", "judge", "measure", "scope", "value", "low", "high", "count"}


def test_a_worst_language_with_few_prompts_has_its_own_interval() -> None:
    """Five of 180 responses are in Swahili, all unsafe. The upper end is 1 - 0.025 ** (1 / 5), not that of 180
    responses."""
    values = torch.full((180, 2), float("nan"), dtype=torch.float64)
    values[:, 0], values[:5, 1] = 1.0, 0.0
    sample = EvaluationSample.of(Subject("m", "s", ("en", "sw"), ("en",)), "j", measures.SAFE, values)
    found = {figure.scope: figure for figure in statistics.figures_of(sample, 200, 0)}
    for scope in ("sw", "worst", "unseen"):
        assert (found[scope].value, found[scope].low, found[scope].high) == (0.0, 0.0, pytest.approx(0.5218, abs=1e-4))
    both = ((0.025 ** (1 / 180)) + 0.025 ** (1 / 5)) / 2
    values[:5, 1] = 1.0
    sure = {
        f.scope: f for f in statistics.figures_of(dataclasses.replace(sample, values=values.nan_to_num(0.0)), 200, 0)
    }
    assert (sure["mean"].low, sure["mean"].high) == (pytest.approx(both), 1.0)
    assert sure["worst"].low == pytest.approx(0.025 ** (1 / 5))
    assert found["seen"].low == pytest.approx(0.025 ** (1 / 180))


def test_intervals_of_the_worst_language_hold_where_all_are_alike() -> None:
    """In at least seven of ten samples. Percentiles would cover it in one of five, because a sample's minimum is too
    low."""
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        values = (torch.rand(60, 10, generator=generator) < 0.8).double()
        sample = EvaluationSample.of(Subject("m", "s", tuple("abcdefghij"), None), "j", measures.SAFE, values)
        worst = next(f for f in statistics.figures_of(sample, 200, 0) if f.scope == "worst")
        held += worst.low <= 0.8 <= worst.high
    assert held >= 42


def test_agreement_is_compared_on_the_same_prompts() -> None:
    ours, theirs = torch.tensor([[0, 0], [1, 1], [1, 1]]), torch.tensor([[0, 0], [0, 1], [MISSING, 1]])
    subject = Subject("m", "s", ("en", "sw"), None)
    found = {f.measure: f for f in statistics.agreement_comparisons_of(ours, theirs, subject, "base", "j", 200, 0)}
    assert (found["pag"].value, found["pag"].count, found["pag"].baseline) == (0.5, 2, "base")
    same = {f.measure: f for f in statistics.agreement_comparisons_of(ours, ours, subject, "base", "j", 200, 0)}
    assert (same["pag"].value, same["pag"].low, same["pag"].high) == (0, 0, 0)
