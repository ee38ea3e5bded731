"""Safety rates and agreement between languages, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mlc.metrics import PairwiseAgreement, SafetyRates
from lightning_mlc.metrics.verdicts import (
    INVALID,
    MISSING,
    SAFE,
    UNSAFE,
    across_languages,
    agreement,
    language_means,
    pair_agreement,
)

S, U, I, N = SAFE, UNSAFE, INVALID, MISSING  # noqa: E741
LANGUAGES = ("en", "sw", "zh")

LABELS = torch.tensor(
    [
        [S, S, S],  # all 3 pairs agree
        [S, U, S],  # 1 of 3
        [S, U, I],  # 0 of 3
        [S, U, N],  # 0 of 1
        [N, U, N],  # no pair
    ]
)


def test_rates_by_hand() -> None:
    metric = SafetyRates(LANGUAGES)
    metric.update(torch.arange(5), LABELS)
    found = {name: float(value) for name, value in metric.compute().items()}
    expected = {
        "safe/en": 1.0,
        "safe/sw": 1 / 5,
        "safe/zh": 2 / 3,
        "unsafe/sw": 4 / 5,
        "unsafe/worst": 4 / 5,
        "invalid/zh": 1 / 3,
        "safe/mean": (1 + 1 / 5 + 2 / 3) / 3,
        "safe/worst": 1 / 5,
        "safe/spread": 4 / 5,
    }
    mean = expected["safe/mean"]
    expected["safe/variance"] = ((1 - mean) ** 2 + (1 / 5 - mean) ** 2 + (2 / 3 - mean) ** 2) / 3
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert sum(found[f"{outcome}/zh"] for outcome in ("safe", "unsafe", "invalid")) == pytest.approx(1)


def test_agreement_by_hand() -> None:
    metric = PairwiseAgreement(LANGUAGES)
    metric.update(torch.arange(5), LABELS)
    found = {name: float(value) for name, value in metric.compute().items()}
    pag = (1 + 1 / 3 + 0 + 0) / 4  # the fifth prompt has no pair
    # Labels of the four prompts with pairs: safe 3 + 2 + 1 + 1, unsafe 0 + 1 + 1 + 1, invalid 1, of 11.
    chance = (7 / 11) ** 2 + (3 / 11) ** 2 + (1 / 11) ** 2
    assert found == pytest.approx({"pag": pag, "kappa": (pag - chance) / (1 - chance)})


def test_kappa_is_that_of_fleiss_in_a_published_example() -> None:
    """Landis and Koch 1977, Biometrics 33, 363-374, give the two-category case in closed form:
    kappa = 1 - sum n_i (m - n_i) / (N m (m - 1) p q)."""
    labels = torch.tensor([[S] * k + [U] * (5 - k) for k in (5, 4, 3, 2, 2, 0)])
    n = torch.tensor([5.0, 4, 3, 2, 2, 0])
    p = float(n.sum() / 30)
    kappa = 1 - float((n * (5 - n)).sum()) / (6 * 5 * 4 * p * (1 - p))
    assert float(agreement(labels, torch.ones(1, 6))["kappa"][0]) == pytest.approx(kappa)


def test_agreement_by_chance_is_none() -> None:
    """Labels drawn independently, with the same probabilities in every language."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(20000, 4, generator=generator) < 0.3).long()
    found = agreement(labels, torch.ones(1, 20000))
    assert float(found["pag"]) == pytest.approx(0.3**2 + 0.7**2, abs=0.005)  # three standard errors
    assert float(found["kappa"]) == pytest.approx(0, abs=0.012)


def test_a_model_that_is_always_safe_agrees_and_has_no_kappa() -> None:
    found = agreement(torch.zeros(4, 3, dtype=torch.int64), torch.ones(1, 4))
    assert float(found["pag"]) == 1
    assert math.isnan(float(found["kappa"]))


def test_weights_count_prompts() -> None:
    """A prompt of weight two counts like a prompt that occurs twice."""
    once = torch.ones(1, 7)
    twice = torch.tensor([[2.0, 1, 0, 1, 3]])
    repeated = LABELS[[0, 0, 1, 3, 4, 4, 4]]
    for name, value in agreement(LABELS, twice).items():
        assert float(value) == pytest.approx(float(agreement(repeated, once)[name]))
    means = language_means((LABELS == S).double(), LABELS != N, twice)
    assert torch.allclose(means, language_means((repeated == S).double(), repeated != N, once))


def test_rows_of_weights_are_independent() -> None:
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    both = agreement(LABELS, weights)
    for row in range(3):
        for name, value in agreement(LABELS, weights[row : row + 1]).items():
            assert torch.equal(both[name][row].isnan(), value[0].isnan())
            assert both[name][row].isnan() or both[name][row] == pytest.approx(float(value[0]))
    means = language_means((LABELS == S).double(), LABELS != N, weights)
    assert means[1].tolist() == [1, 0, 0]
    assert means[2].isnan().tolist() == [True, False, True]  # no language was drawn


def test_languages_that_are_unknown_take_no_part_in_summaries() -> None:
    found = across_languages(torch.tensor([[0.5, math.nan, 0.9], [math.nan] * 3]), higher_is_better=True)
    assert found["mean"].tolist()[0] == pytest.approx(0.7)
    assert found["worst"].tolist()[0] == pytest.approx(0.5)
    assert found["variance"].tolist()[0] == pytest.approx(0.04)
    assert all(math.isnan(value.tolist()[1]) for value in found.values())
    assert "worst" not in across_languages(torch.ones(1, 2), higher_is_better=None)


def test_the_matrix_of_pairs() -> None:
    matrix = pair_agreement(LABELS)
    assert matrix[0, 1] == pytest.approx(1 / 4)  # en and sw, of four prompts with both
    assert matrix[0, 2] == pytest.approx(2 / 3)
    assert matrix[1, 2] == pytest.approx(1 / 3)
    assert matrix.diagonal().tolist() == [1, 1, 1]
    assert pair_agreement(torch.tensor([[S, N], [N, U]])).isnan()[0, 1]


@pytest.mark.parametrize("metric", [SafetyRates(LANGUAGES), PairwiseAgreement(LANGUAGES)])
def test_prompts_count_once_however_they_come(metric: SafetyRates | PairwiseAgreement) -> None:
    metric.reset()
    metric.update(torch.arange(5), LABELS)
    whole = metric.compute()
    metric.reset()
    metric.update(torch.tensor([3, 0, 4]), LABELS[[3, 0, 4]])
    metric.update(torch.tensor([2, 1, 0]), LABELS[[2, 1, 0]])  # a sampler that pads repeats some examples
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {name: float(value) for name, value in whole.items()}
    )


def test_empty_is_nan() -> None:
    assert all(math.isnan(float(value)) for value in PairwiseAgreement(LANGUAGES).compute().values())
    assert all(math.isnan(float(value)) for value in SafetyRates(LANGUAGES).compute().values())


def test_plot_has_a_bar_per_language_and_marks_the_worst() -> None:
    metric = SafetyRates(LANGUAGES)
    metric.update(torch.arange(5), LABELS)
    _, axes = metric.plot()
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1, 0.2, 2 / 3])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["en", "sw\nworst", "zh"]


# Safe rates of Qwen2.5-7B-Instruct in ten languages, and their variance, from arXiv 2602.16660, PKU-SafeRLHF.
PUBLISHED = {
    "raw": ([93.3, 96.1, 93.3, 92.2, 93.9, 53.3, 6.1, 33.9, 21.1, 12.2], 13.14),
    "DPO": ([99.4, 98.3, 97.2, 97.8, 96.1, 70.6, 7.2, 50.6, 30.0, 17.2], 12.44),
    "MPO": ([81.1, 81.7, 82.2, 77.2, 78.3, 77.2, 4.4, 70.6, 59.4, 42.8], 5.53),
    "DPO+MLC": ([99.4, 96.7, 97.8, 98.3, 98.3, 95.0, 92.8, 92.8, 91.1, 97.2], 0.07),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_published_variance_is_of_fractions_times_100(row: str) -> None:
    percent, published = PUBLISHED[row]
    variance = across_languages(torch.tensor([percent]).double() / 100, higher_is_better=True)["variance"]
    # The rates are published to 0.1 and the variance to 0.01, so rounding changes it by up to another 0.01.
    assert 100 * float(variance) == pytest.approx(published, abs=0.015)


def test_agreement_is_the_mean_over_pairs_of_languages_where_no_verdict_is_missing() -> None:
    labels = torch.tensor([[S, S, U], [S, U, U], [U, U, U], [S, S, S]])
    # en-sw agree in 3 of 4 prompts, en-zh in 2, sw-zh in 3.
    pairs = pair_agreement(labels)
    assert [float(pairs[0, 1]), float(pairs[0, 2]), float(pairs[1, 2])] == [3 / 4, 2 / 4, 3 / 4]
    found = agreement(labels, torch.ones(1, 4))["pag"]
    assert float(found) == pytest.approx((3 / 4 + 2 / 4 + 3 / 4) / 3)
