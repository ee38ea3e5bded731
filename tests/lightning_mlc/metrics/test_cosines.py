"""LanguageCosines: missing languages, rows without a direction, rows that are not finite."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from lightning_mlc.metrics import LanguageCosines

LANGUAGES = ("en", "sw", "zh")
ALL = torch.ones(1, 3, dtype=torch.bool)


def matrix(states: torch.Tensor, mask: torch.Tensor = ALL) -> np.ndarray:
    metric = LanguageCosines(LANGUAGES)
    metric.update(torch.arange(len(states)), states, mask)
    return metric.compute().numpy()


def test_means_over_the_examples_that_have_both_by_hand() -> None:
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], [[1.0, 0.0], [5.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    half = 1 / math.sqrt(2)
    # en-sw is (0 + 1) / 2; the pairs with zh come only from the first example.
    np.testing.assert_allclose(matrix(states, mask), [[1, 0.5, half], [0.5, 1, half], [half, half, 1]], atol=1e-12)


def test_a_language_that_never_occurs_is_nan_and_so_is_one_of_zeros() -> None:
    states = torch.randn(1, 3, 4)
    gone = matrix(states, torch.tensor([[True, False, True]]))
    states[0, 1] = 0
    for found in (gone, matrix(states)):
        assert np.isnan(found).tolist() == [[False, True, False], [True, True, True], [False, True, False]]


def test_not_finite_shows_in_the_pairs_of_its_language_alone() -> None:
    states = torch.randn(2, 3, 4)
    clean = matrix(states, ALL.expand(2, 3))
    for bad in (float("nan"), float("inf")):
        states[1, 1, 0] = bad
        found = matrix(states, ALL.expand(2, 3))
        assert np.isnan(found).tolist() == [[False, True, False], [True, True, True], [False, True, False]]
        np.testing.assert_allclose(found[0, 2], clean[0, 2])


def test_missing_rows_may_hold_nan() -> None:
    states = torch.randn(1, 3, 4)
    states[0, 1] = float("nan")
    found = matrix(states, torch.tensor([[True, False, True]]))
    assert np.isfinite(found[[0, 0, 2], [0, 2, 2]]).all()


def test_empty_is_nan_and_silent_also_after_reset() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = LanguageCosines(LANGUAGES)
        assert metric.compute().shape == (3, 3)
        assert metric.compute().isnan().all()
        metric.update(torch.tensor([0]), torch.randn(1, 3, 4), ALL)
        metric.reset()
        assert metric.compute().isnan().all()


def test_order_and_cut_and_repeats_give_the_same_bits() -> None:
    states = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    keys, mask = torch.arange(6), torch.rand(6, 3, generator=torch.Generator().manual_seed(4)) > 0.3
    whole, pieces = LanguageCosines(LANGUAGES), LanguageCosines(LANGUAGES)
    whole.update(keys, states, mask)
    for part in ([5, 2], [0], [4, 3, 1, 5, 0]):
        pieces.update(keys[part], states[part], mask[part])
    assert torch.equal(whole.compute().nan_to_num(9), pieces.compute().nan_to_num(9))
    assert whole.compute().dtype == torch.float64


def test_plot_takes_given_values() -> None:
    given = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    _, axes = LanguageCosines(("en", "sw")).plot(given)
    np.testing.assert_allclose(axes.images[0].get_array(), given)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["en", "sw"]
