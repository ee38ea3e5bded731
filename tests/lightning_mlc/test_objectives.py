"""Objectives against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mlc.errors import UserError
from lightning_mlc.objectives import DPO, SFT, Scores


def scores(logps: list[float], tokens: list[float], reference: list[float] | None = None) -> Scores:
    return Scores(torch.tensor(logps), torch.tensor(tokens), None if reference is None else torch.tensor(reference))


def test_dpo() -> None:
    chosen = scores([-10.0, -20.0], [5, 5], [-12.0, -18.0])
    rejected = scores([-15.0, -9.0], [5, 5], [-11.0, -10.0])
    losses = DPO(beta=0.5).losses(chosen, rejected)
    # Log-ratios: +2 against -4, and -2 against +1.
    expected = [math.log(1 + math.exp(-0.5 * 6)), math.log(1 + math.exp(0.5 * 3))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert DPO(beta=0.5).rewards(chosen).tolist() == pytest.approx([1.0, -1.0])


def test_dpo_is_stable_far_from_the_reference() -> None:
    far = scores([0.0], [1], [1e6]), scores([0.0], [1], [-1e6])
    assert DPO().losses(*far).item() == pytest.approx(2e5)


def test_sft_sums_and_leaves_the_mean_to_the_step() -> None:
    objective = SFT()
    assert objective.losses(scores([-10.0, -3.0], [5, 1]), None).tolist() == [10.0, 3.0]
    assert objective.mean_over == "tokens"


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(UserError, match=r"model\.objective\.beta"):
        DPO(beta=beta)
