"""The losses of a step, against sums written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mlc.consistency import MLC, Consistency, Observed, PairwiseCosine
from lightning_mlc.data.batches import Batch, Normalizers
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.errors import UserError
from lightning_mlc.models.forward import Grid
from lightning_mlc.objectives import DPO, KTO, SFT
from lightning_mlc.training.losses import Losses

GROUPS = 8.0
"""Number of groups in the whole optimizer step, of which the batch has three."""


def batch() -> Batch:
    normalizers = Normalizers(examples=8, response_tokens=40, groups=GROUPS, chosen=8, rejected=8)
    return Batch(("a", "b", "c"), torch.arange(3), ("en", "sw"), 0, (), (), normalizers)


def observed(representations: torch.Tensor) -> Observed:
    count, languages, _ = representations.shape
    zeros = torch.zeros(count, languages, 3)
    present = torch.ones(count, languages, dtype=torch.bool)
    return Observed(Grid(zeros, zeros, representations, present), None, representations, 0)


@pytest.mark.parametrize("detailed", [True, False])
def test_the_consistency_loss_is_the_weighted_mean_over_the_step(detailed: bool) -> None:
    mlc, cosine = MLC(weight=3.0), PairwiseCosine(weight=0.5)
    losses = Losses(SFT(), Consistency(mlc=mlc, pairwise_cosine=cosine))
    seen = observed(torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = losses.of_consistency(batch(), seen, losses.consistency.terms, detailed)
    means = {term.name: float(term.losses(seen).sum()) / GROUPS for term in (mlc, cosine)}
    assert min(means.values()) > 0.01
    assert float(found.loss) == pytest.approx(3.0 * means["mlc"] + 0.5 * means["pairwise_cosine"], rel=1e-12)
    assert {name: float(found.metrics[f"{name}/loss"]) for name in means} == pytest.approx(means, rel=1e-12)
    assert len(found.metrics) > 2 if detailed else len(found.metrics) == 2


@pytest.mark.parametrize(("rows", "chosen", "total"), [("harmful", [0, 2], 5.0), ("ordinary", [1], 3.0)])
def test_a_term_has_the_mean_over_its_own_rows(rows: Any, chosen: list[int], total: float) -> None:
    """Three of the eight groups of the step are ordinary, and one of the batch's three."""
    one = batch()
    one.normalizers.ordinary_groups = 3.0
    mlc = MLC(weight=3.0, rows=rows)
    losses = Losses(SFT(), Consistency(mlc=mlc, pairwise_cosine=PairwiseCosine(weight=0.5)))
    states = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    seen = observed(states)._replace(is_ordinary=torch.tensor([False, True, False]))
    found = losses.of_consistency(one, seen, losses.consistency.terms, detailed=True)
    each = MLC().losses(observed(states))
    assert float(found.metrics["mlc/loss"]) == pytest.approx(float(each[chosen].sum()) / total)
    variances = MLC().metrics(observed(states))["explained_variance"]
    assert float(found.metrics["mlc/explained_variance"]) == pytest.approx(float(variances[chosen].sum()) / total)
    every = float(PairwiseCosine().losses(observed(states)).sum()) / GROUPS
    assert float(found.metrics["pairwise_cosine/loss"]) == pytest.approx(every)
    (gradient,) = torch.autograd.grad(losses.of_consistency(one, seen, (mlc,), detailed=False).loss, states)
    moved = (gradient != 0).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == chosen


def test_a_step_without_rows_of_a_term_logs_nothing_of_it() -> None:
    one = batch()
    one.normalizers.ordinary_groups = GROUPS
    losses = Losses(SFT(), Consistency(mlc=MLC(rows="harmful")))
    seen = observed(torch.randn(3, 2, 16))._replace(is_ordinary=torch.ones(3, dtype=torch.bool))
    found = losses.of_consistency(one, seen, losses.consistency.terms, detailed=True)
    assert found.loss == 0
    assert set(found.metrics) == {"mlc/between_prompts", "mlc/raw/between_prompts"}  # of all rows


def test_a_step_without_groups_has_no_consistency_loss() -> None:
    alone = batch()
    alone.normalizers.groups = 0.0
    seen = observed(torch.randn(3, 2, 16))
    seen = seen._replace(policy=seen.policy._replace(present=torch.tensor([[True, False]] * 3)))
    losses = Losses(None, Consistency(mlc=MLC(weight=1.0)))
    assert losses.of_consistency(alone, seen, losses.consistency.terms, detailed=True).loss == 0


@pytest.mark.parametrize(
    ("objective", "consistency", "plan"),
    [
        (DPO(), Consistency(mlc=MLC(weight=0.8)), RowPlan(True, "source", True, False)),
        (SFT(), Consistency(mlc=MLC(weight=0.0)), RowPlan(False, "source", False, False)),
        (KTO(), Consistency(mlc=MLC(weight=0.0)), RowPlan(True, "source", False, True)),
        (None, Consistency(mlc=MLC(weight=0.8)), RowPlan(False, "none", True, False)),
    ],
)
def test_rows_that_a_step_runs(objective: Any, consistency: Consistency, plan: RowPlan) -> None:
    assert Losses(objective, consistency).row_plan == plan


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.objective: is null, and no term"):
        Losses(None, Consistency(mlc=MLC(weight=0.0)))
    with pytest.raises(UserError, match=r"^model\.consistency\.every_n_steps: "):
        Losses(None, Consistency(mlc=MLC(weight=0.8), every_n_steps=2))
