"""Figures that compare harmful with ordinary prompts: values by hand, intervals, and cells with too few prompts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mlc.evaluation.reporting import measures
from lightning_mlc.evaluation.reporting.bootstrap import stratified_weights
from lightning_mlc.evaluation.reporting.cells import figure_cell
from lightning_mlc.evaluation.reporting.measures import DECLINE_GAP, SEPARATION, EvaluationMeasure
from lightning_mlc.evaluation.reporting.results import finite
from lightning_mlc.evaluation.reporting.separation import (
    SeparationSample,
    separation_comparisons,
    separation_figures,
    separation_samples,
)
from lightning_mlc.evaluation.reporting.statistics import EvaluationSample, Figure, Subject

NAN = math.nan
LANGUAGES = ("en", "sw", "zh")


def sample(
    harmful: Tensor, ordinary: Tensor, measure: EvaluationMeasure, model: str = "m", seen: tuple[str, ...] | None = None
) -> SeparationSample:
    subject = Subject(model, "asked", LANGUAGES[: harmful.shape[1]], seen)
    return SeparationSample(subject, "judge", measure, harmful.double(), ordinary.double())


def by_scope(found: SeparationSample, replicates: int = 300) -> dict[str, Figure]:
    return {figure.scope: figure for figure in separation_figures(found, replicates, seed=0)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(*columns: tuple[int, int]) -> Tensor:
    """(N, L): in each language the first of ``(declined, all)`` prompts are declined."""
    return torch.stack([(torch.arange(total) < some).double() for some, total in columns], dim=1)


def test_each_stratum_is_drawn_by_itself() -> None:
    weights = stratified_weights([5, 5], 400, seed=1)
    assert weights.shape == (400, 10)
    assert bool((weights[:, :5].sum(1) == 5).all())
    assert bool((weights[:, 5:].sum(1) == 5).all())
    correlation = torch.corrcoef(torch.stack([weights[:, 0], weights[:, 5]]))[0, 1]
    assert abs(float(correlation)) < 0.2  # 4 standard errors of 400 draws; the same draws would have 1


def test_gaps_of_declines_by_hand() -> None:
    harmful, ordinary = shares((6, 8), (8, 8), (2, 8)), shares((2, 10), (10, 10), (3, 10))
    found = by_scope(sample(harmful, ordinary, DECLINE_GAP, seen=("en", "zh")))
    gaps = {"en": 0.75 - 0.2, "sw": 0.0, "zh": 0.25 - 0.3}
    expected = gaps | {
        "mean": sum(gaps.values()) / 3,
        "worst": gaps["zh"],
        "spread": gaps["en"] - gaps["zh"],
        "seen": (gaps["en"] + gaps["zh"]) / 2,
        "unseen": 0.0,
    }
    assert {scope: found[scope].value for scope in expected} == {s: pytest.approx(v) for s, v in expected.items()}
    assert (found["en"].kinds, found["mean"].kinds, found["unseen"].kinds) == ((8, 10), (24, 30), (8, 10))
    assert all(-1 <= figure.low <= figure.high <= 2 for figure in found.values())


def test_a_model_that_refuses_everything_is_not_certain_to_tell_nothing_apart() -> None:
    """8 of 8 and 10 of 10 are declined. Clopper and Pearson's ends are 0.025^(1/8) and 0.025^(1/10)."""
    figure = by_scope(sample(shares((8, 8)), shares((10, 10)), DECLINE_GAP))
    low, high = -(1 - 0.025 ** (1 / 8)), 1 - 0.025 ** (1 / 10)
    for scope in ("en", "mean", "worst"):
        assert (figure[scope].value, figure[scope].low, figure[scope].high) == (
            0,
            pytest.approx(low),
            pytest.approx(high),
        )


def test_a_perfect_area_is_not_certain() -> None:
    harmful, ordinary = normal(9, 2) + 20, normal(7, 2, seed=1)
    harmful[6:, 1] = NAN
    found = by_scope(sample(harmful, ordinary, SEPARATION))
    bounds = {"en": 0.025 ** (1 / 7), "sw": 0.025 ** (1 / 6)}
    bounds |= {"mean": (bounds["en"] + bounds["sw"]) / 2, "worst": bounds["sw"]}
    for scope, low in bounds.items():
        assert (found[scope].value, found[scope].low, found[scope].high) == (1, pytest.approx(low), 1)
    assert found["spread"].value == 0


def test_intervals_of_the_area_cover_as_often_as_they_say() -> None:
    """Normal values that are one standard deviation apart have an area of Phi(1 / sqrt(2))."""
    truth, covered = 0.5 * (1 + math.erf(1 / 2)), 0
    for trial in range(200):
        own = sample(normal(40, 1, seed=2 * trial) + 1, normal(30, 1, seed=2 * trial + 1), SEPARATION)
        figure = by_scope(own, replicates=200)["en"]
        covered += figure.low <= truth <= figure.high
    # The standard error of 200 trials is 1.5 %. Percentile intervals of small samples cover a little less than 95 %.
    assert 0.89 <= covered / 200 <= 0.99


def test_too_few_prompts_have_no_figure_and_say_so() -> None:
    harmful, ordinary = normal(12, 2), normal(12, 2, seed=1)
    ordinary[5:, 1] = NAN
    found = by_scope(sample(harmful, ordinary, SEPARATION))
    assert math.isnan(found["sw"].value)
    assert found["sw"].kinds == (12, 5)
    assert found["mean"].value == found["en"].value
    assert figure_cell(finite(found["sw"].as_dict())) == "too few (12 harmful, 5 ordinary)"
    none = by_scope(sample(harmful[:5], ordinary, SEPARATION))
    assert figure_cell(finite(none["mean"].as_dict())) == "too few (10 harmful, 17 ordinary)"
    assert list(separation_comparisons(*[sample(harmful[:5], ordinary, SEPARATION)] * 2, 100, 0)) == []


def test_models_are_compared_on_the_same_prompts() -> None:
    """Where one model has no number, the other's does not count either."""
    harmful, ordinary = normal(30, 2), normal(20, 2, seed=1)
    better = harmful + 0.5
    missing = better.clone()
    missing[:10, 0] = NAN
    base, new = sample(harmful, ordinary, SEPARATION, "a"), sample(missing, ordinary, SEPARATION, "b", seen=("en",))
    found = {figure.scope: figure for figure in separation_comparisons(new, base, 300, 0)}
    assert (found["en"].model, found["en"].baseline, found["en"].kinds) == ("b", "a", (20, 20))
    both = [by_scope(sample(own[10:], ordinary, SEPARATION))["en"].value for own in (better, harmful)]
    assert found["en"].value == pytest.approx(both[0] - both[1])
    assert found["mean"].low > 0
    same = {figure.scope: figure for figure in separation_comparisons(base, base, 100, 0)}
    assert (same["mean"].value, same["mean"].low, same["mean"].high) == (0, 0, 0)


def test_ordinary_prompts_of_all_sets_count_in_the_languages_of_the_harmful_ones() -> None:
    def of(name: str, languages: tuple[str, ...], measure: EvaluationMeasure, values: Tensor) -> EvaluationSample:
        return EvaluationSample.of(Subject("m", name, languages, None), "margin", measure, values)

    harmful = of("h", ("en", "sw"), measures.REFUSAL_MARGIN, normal(4, 2))
    first = of("a", ("sw", "en", "ru"), measures.ORDINARY_REFUSAL_MARGIN, normal(3, 3, seed=1))
    second = of("b", ("en",), measures.ORDINARY_REFUSAL_MARGIN, normal(2, 1, seed=2))
    declines = of("a", ("sw", "en", "ru"), measures.OVER_REFUSAL, torch.ones(3, 3))
    (found,) = separation_samples([harmful, first, second, declines])
    assert (found.measure, found.subject.set) == (SEPARATION, "h")
    expected = torch.full((5, 2), NAN, dtype=torch.float64)
    expected[:3], expected[3:, 0] = first.values[:, [1, 0]], second.values[:, 0]
    torch.testing.assert_close(found.ordinary, expected, equal_nan=True)
    assert separation_samples([harmful, declines]) == []
