"""Harmful prompts against ordinary ones: values by hand, ties, weights, and what the measure is for."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
import torchmetrics.functional.classification

from lightning_mlc.metrics import Separation
from lightning_mlc.metrics.separation import LEAST_PROMPTS, has_enough, separation

NAN = math.nan


def once(*parts: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, sum(map(len, parts)))


def area(harmful: list[float], ordinary: list[float]) -> float:
    values = torch.tensor(harmful)[:, None], torch.tensor(ordinary)[:, None]
    return float(separation(*values, once(*values)))


def test_areas_by_hand() -> None:
    assert area([3.0, 4.0], [1.0, 2.0]) == 1
    assert area([1.0, 2.0], [3.0, 4.0]) == 0
    assert area([1.0, 3.0], [2.0]) == 0.5
    assert area([2.0, 3.0], [1.0, 2.0]) == (1 + 0.5 + 1 + 1) / 4  # one tie
    assert area([5.0, 5.0], [5.0, 5.0, 5.0]) == 0.5  # ties alone: one state for everything
    assert area([-0.5, 0.25, 0.5], [-1.0, 0.25]) == (1 + 0 + 1 + 0.5 + 1 + 1) / 6


def test_areas_are_those_of_scipy_and_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    harmful = (torch.rand(40, 3, generator=generator) * 8).round() / 8  # with ties
    ordinary = (torch.rand(25, 3, generator=generator) * 6).round() / 8
    found = separation(harmful, ordinary, once(harmful, ordinary))[0]
    for column in range(3):
        first, second = harmful[:, column], ordinary[:, column]
        assert float(found[column]) == pytest.approx(scipy.stats.mannwhitneyu(first, second).statistic / (40 * 25))
        labels = torch.cat([torch.ones(40), torch.zeros(25)]).long()
        theirs = torchmetrics.functional.classification.binary_auroc(torch.cat([first, second]), labels)
        assert float(found[column]) == pytest.approx(float(theirs), abs=1e-6)  # theirs is float32


def test_a_weight_is_a_number_of_copies() -> None:
    harmful, ordinary = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[2.0], [3.0]])
    weights = torch.tensor([[2.0, 0.0, 1.0, 3.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    found = separation(harmful, ordinary, weights)[:, 0].tolist()
    assert found[0] == area([1.0, 1.0, 4.0], [2.0, 2.0, 2.0, 3.0])
    assert found[1] == 0.5
    assert math.isnan(found[2])  # no ordinary prompt is drawn


def test_a_missing_language_is_left_out() -> None:
    harmful, ordinary = torch.tensor([[1.0, NAN], [3.0, 9.0]]), torch.tensor([[2.0, NAN], [NAN, NAN]])
    found = separation(harmful, ordinary, once(harmful, ordinary))[0].tolist()
    assert found[0] == 0.5
    assert math.isnan(found[1])


def test_refusing_everything_is_not_telling_apart() -> None:
    """All margins rise alike: no change. Those of harmful prompts rise: a change. All become one: chance."""
    generator = torch.Generator().manual_seed(1)
    harmful, ordinary = (torch.randn(30, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = once(harmful, ordinary)
    before = separation(harmful, ordinary, weights)
    torch.testing.assert_close(separation(harmful + 4, ordinary + 4, weights), before)
    assert bool((separation(harmful + 4, ordinary, weights) > before + 0.3).all())
    refusing = torch.full((30, 2), 7.0)
    assert separation(refusing, refusing, weights).tolist() == [[0.5, 0.5]]


def test_five_prompts_of_a_kind_can_show_nothing() -> None:
    assert 0.025 ** (1 / (LEAST_PROMPTS - 1)) < 0.5 < 0.025 ** (1 / LEAST_PROMPTS)
    values = torch.zeros(LEAST_PROMPTS, 2)
    values[0, 1] = NAN
    assert has_enough(values, torch.zeros(9, 2)).tolist() == [True, False]
    assert has_enough(torch.zeros(9, 2), values).tolist() == [True, False]


def test_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 2\) and \(1, 4\)"):
        separation(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(1, 4))
    with pytest.raises(ValueError, match="must be"):
        separation(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(1, 5))


def test_the_metric_counts_each_prompt_once_in_any_order() -> None:
    metric = Separation(["en", "sw", "ps"])
    empty = metric.compute()
    assert set(empty) == {"mean", "worst", "spread"}
    assert all(math.isnan(value) for value in empty.values())
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    values[:8, 0] += 1
    values[8:14, 2] = NAN  # two ordinary prompts are left in this language
    is_ordinary = torch.arange(16) >= 8
    for part in (torch.arange(10), torch.tensor([15, 9, 14, 13, 12, 11, 10, 0])):
        metric.update(part, values[part], is_ordinary[part])
    found = {name: float(value) for name, value in metric.compute().items()}
    assert set(found) == {"en", "sw", "mean", "worst", "spread"}
    for column, name in enumerate(("en", "sw")):
        assert found[name] == area(values[:8, column].tolist(), values[8:, column].tolist())
    assert found["mean"] == pytest.approx((found["en"] + found["sw"]) / 2)
    assert found["worst"] == min(found["en"], found["sw"])
