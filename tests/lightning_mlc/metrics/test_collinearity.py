"""Collinearity: values by hand, rows without a direction, rows that are not finite."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mlc.consistency.measures import collinearity
from lightning_mlc.metrics import Collinearity
from lightning_mlc.metrics.collinearity import MEASURES

ALL = torch.ones(1, 3, dtype=torch.bool)


def measures(states: Tensor, mask: Tensor = ALL, **options: object) -> dict[str, float]:
    found = collinearity(states, mask, **options)  # type: ignore[arg-type]
    return {name: float(value) for name, value in found.items() if name != "valid"}


def test_two_orthogonal_rows_and_one_between_by_hand() -> None:
    # Gram matrix [[1, 0, c], [0, 1, c], [c, c, 1]] with c = 1/sqrt(2): eigenvalues 1 + 1, 1, 1 - 1.
    states = torch.tensor([[[2.0, 0.0], [0.0, 0.5], [3.0, 3.0]]])
    found = measures(states)
    logits = np.array([1.0, 1 / math.sqrt(2)]) / 0.2  # two features, so there is no third singular value
    assert found["loss"] == pytest.approx(math.log(np.exp(logits - logits[0]).sum()), abs=1e-9)
    assert found["excess"] == pytest.approx(found["loss"] - math.log(1 + 2 * math.exp(-5)), abs=1e-9)
    assert found["explained_variance"] == pytest.approx(2 / 3)
    assert found["min_cosine"] == pytest.approx(0, abs=1e-12)


def test_temperature_and_scale_reach_loss_and_floor() -> None:
    line = torch.tensor([[[1.0, 2.0, 2.0], [2.0, 4.0, 4.0], [-0.5, -1.0, -1.0]]])
    found = measures(line, temperature=0.5, scale="none")
    assert found["loss"] == pytest.approx(math.log(1 + 2 * math.exp(-math.sqrt(3) / 0.5)), abs=1e-6)
    assert found["excess"] == pytest.approx(0, abs=1e-6)
    assert found["min_cosine"] == pytest.approx(-1)


def test_a_row_of_zeros_is_a_missing_row() -> None:
    states = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    masked = measures(states, torch.tensor([[True, False, True]]))
    states[0, 1] = 0
    assert measures(states) == pytest.approx(masked, abs=1e-12)
    states[0, 2] = 0
    assert not collinearity(states, ALL)["valid"].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_nan_for_its_example_alone(bad: float) -> None:
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    clean = measures(states[1:])
    states[0, 1, 2] = bad
    found = collinearity(states, ALL.expand(2, 3))
    assert found["valid"].tolist() == [True, True]
    for name in MEASURES:
        assert found[name].isnan().tolist() == [True, False]
        assert float(found[name][1]) == pytest.approx(clean[name], abs=1e-12)
    metric = Collinearity()
    metric.update(torch.tensor([0, 1]), states, ALL.expand(2, 3))
    assert all(value.isnan() for value in metric.compute().values())


def test_what_stands_where_a_row_is_missing_is_not_looked_at() -> None:
    states = torch.randn(1, 3, 4)
    mask = torch.tensor([[True, False, True]])
    expected = measures(states, mask)
    states[0, 1] = float("nan")
    assert measures(states, mask) == pytest.approx(expected, abs=1e-12)


def test_two_rows_of_which_one_is_not_finite_do_not_vanish() -> None:
    states = torch.randn(1, 3, 4)
    states[0, 1] = float("nan")
    mask = torch.tensor([[True, True, False]])
    assert collinearity(states, mask)["valid"].item()
    assert all(map(math.isnan, measures(states, mask).values()))


def test_large_half_precision_rows_neither_overflow_nor_lose_the_signal() -> None:
    # Squares of 6e4 overflow float16; cosines of 1 - 5e-9 are 1 in float32.
    states = torch.tensor([[[6e4, 6.0], [6e4, 0.0], [6e4, 6.0]]], dtype=torch.float16)
    found = measures(states)
    angle = math.atan2(6.0, float(torch.tensor(6e4, dtype=torch.float16)))
    assert 1 - found["min_cosine"] == pytest.approx(1 - math.cos(angle), rel=1e-6)
    assert 0 < 1 - found["explained_variance"] < 1e-8


@pytest.mark.parametrize("magnitude", [1e-200, 1e200])
def test_float64_squares_out_of_range_do_no_harm(magnitude: float) -> None:
    states = torch.randn(1, 3, 4, dtype=torch.float64)
    assert measures(states * magnitude) == pytest.approx(measures(states), abs=1e-9)


def test_autocast_changes_nothing() -> None:
    states = torch.randn(1, 3, 64)
    expected = measures(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measures(states) == expected


def test_inputs_stay_as_they_are_and_no_gradient_is_kept() -> None:
    states = torch.randn(1, 3, 4, requires_grad=True)
    before = states.detach().clone()
    assert not any(value.requires_grad for value in collinearity(states, ALL).values())
    assert torch.equal(states, before)


def test_batches_without_a_pair_count_for_nothing_and_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = Collinearity()
        assert all(value.isnan() for value in metric.compute().values())
        metric.update(torch.tensor([0]), torch.randn(1, 3, 4), torch.tensor([[True, False, False]]))
        assert all(value.isnan() for value in metric.compute().values())
    states = torch.randn(1, 3, 4)
    metric.update(torch.tensor([1]), states, ALL)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(measures(states))


def test_order_and_cut_and_repeats_give_the_same_bits() -> None:
    states = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(3))
    keys, mask = torch.arange(6), ALL.expand(6, 3)
    whole, pieces = Collinearity(), Collinearity()
    whole.update(keys, states, mask)
    for part in ([5, 2], [0], [4, 3, 1, 5, 0]):
        pieces.update(keys[part], states[part], mask[part])
    assert [float(v) for v in whole.compute().values()] == [float(v) for v in pieces.compute().values()]


def test_plot_draws_the_two_measures_that_end_at_one() -> None:
    metric = Collinearity()
    metric.update(torch.tensor([0]), torch.randn(1, 3, 4), ALL)
    results = metric.compute()
    _, axes = metric.plot()
    expected = [float(results[name]) for name in ("explained_variance", "min_cosine")]
    assert [bar.get_height() for bar in axes.patches] == expected


def test_the_floor_is_that_of_the_rows_that_are_there() -> None:
    line = torch.tensor([[[1.0, 2.0], [2.0, 4.0], [0.0, 0.0], [7.0, 7.0]]])
    found = measures(line, torch.tensor([[True, True, True, False]]))  # two usable rows of four
    assert found["loss"] == pytest.approx(math.log(1 + math.exp(-5)), abs=1e-6)
    assert found["excess"] == pytest.approx(0, abs=1e-6)


def test_the_eigen_solver_is_kept_from_rows_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    # LAPACK, cuSOLVER and the operator's other backends handle NaN in different ways; some raise.
    seen: list[bool] = []

    def watch(representations: Tensor, mask: Tensor, **options: object) -> Tensor:
        seen.append(bool(representations[mask].isfinite().all()))
        return torch.ones(mask.shape)

    module = sys.modules["lightning_mlc.consistency.measures"]
    monkeypatch.setattr(module, "singular_values", watch)
    monkeypatch.setattr(module, "mlc_loss", lambda *given, **options: watch(*given)[:, 0])
    states = torch.randn(2, 3, 4)
    states[0, 1, 2] = float("inf")
    collinearity(states, ALL.expand(2, 3))
    assert seen == [True, True]
