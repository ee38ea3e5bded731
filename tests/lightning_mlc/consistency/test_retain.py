"""Ordinary prompts stay where the reference has them: values by hand, the gradient, and whole steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, write_jsonl
from torch import Tensor

from lightning_mlc.commands.training import run
from lightning_mlc.consistency import Observed, Retain
from lightning_mlc.errors import UserError
from lightning_mlc.models.forward import Grid


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observed(ours: Tensor, theirs: Tensor, present: Tensor, is_ordinary: Tensor | None = None) -> Observed:
    nothing = torch.zeros(*present.shape, 3)
    grids = [Grid(nothing, nothing, states, present) for states in (ours, theirs)]
    return Observed(grids[0], grids[1], random(*ours.shape, seed=9), 0, is_ordinary)


PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])


def test_distances_by_hand() -> None:
    """A step of 1 from a state of length 5, and a state that is doubled."""
    theirs = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    ours = torch.tensor([[[3.0, 5.0], [2.0, 0.0]]])
    both = torch.ones(1, 2, dtype=torch.bool)
    assert Retain().losses(observed(ours, theirs, both)).tolist() == pytest.approx([(1 / 25 + 1) / 2])
    cosine = (3 * 3 + 4 * 5) / (5 * math.sqrt(34))
    assert Retain(distance="cosine").losses(observed(ours, theirs, both)).tolist() == pytest.approx([(1 - cosine) / 2])
    for distance in ("squared", "cosine"):
        assert Retain(distance=distance).losses(observed(theirs, theirs, both)).tolist() == [0.0]


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_gradients_and_missing_languages(distance: Any) -> None:
    theirs = random(3, 3, 4, seed=1)
    spoilt = torch.where(PRESENT[:, :, None], theirs, math.nan)
    term = Retain(distance=distance)
    ours = random(3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: term.losses(observed(h, theirs, PRESENT)), (ours,))
    losses = term.losses(observed(torch.where(PRESENT[:, :, None], ours, math.nan), spoilt, PRESENT))
    torch.testing.assert_close(losses, term.losses(observed(ours, theirs, PRESENT)))
    assert losses[2] == 0  # in one language alone
    (gradient,) = torch.autograd.grad(losses.sum(), ours)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[~PRESENT] == 0).all())
    if distance == "squared":
        each = (ours - theirs).square().sum(2) / theirs.square().sum(2)
        torch.testing.assert_close(losses[1], (each[1, 0] + each[1, 2]) / 2)


def test_only_ordinary_prompts_are_kept() -> None:
    ours, theirs = random(3, 3, 4).requires_grad_(), random(3, 3, 4, seed=1)
    seen = observed(ours, theirs, PRESENT, is_ordinary=torch.tensor([False, True, True]))
    term = Retain()
    losses = term.losses(seen.only(term.rows))
    assert [loss > 0 for loss in losses.tolist()] == [False, True, False]
    (gradient,) = torch.autograd.grad(losses.sum(), ours)
    assert (gradient != 0).flatten(1).any(1).tolist() == [False, True, False]


OPTIONS = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
OPTIONS += ["--trainer.max_steps=4", "--trainer.log_every_n_steps=1", "--model.optimizer=AdamW"]
OPTIONS += ["--model.optimizer.lr=1e-2", "--model.consistency.mlc.weight=0.5", "--data.val_share=0.25"]


def fitted(model: Path, folder: Path, *more: str) -> dict[str, list[float]]:
    rows = example_rows(12)
    for row in rows[::2]:
        row["kind"] = "ordinary"
    data = write_jsonl(folder / "rows.jsonl", rows)
    given = [f"--model.name_or_path={model}", f"--data.train_path={data}", f"--out={folder / 'out'}"]
    run(["fit", *given, *OPTIONS, *more])
    return columns(folder / "out")


@pytest.mark.slow
def test_a_run_stays_near_its_reference(tiny_model: Path, tmp_path: Path) -> None:
    """At first the policy is the reference. A large weight keeps it there."""
    (tmp_path / "kept").mkdir()
    found = fitted(tiny_model, tmp_path / "kept", "--model.consistency.retain.weight=100", "--data.batch_size=3")
    assert found["train/retain/loss"][0] == 0
    assert found["train/retain/loss"][-1] > 0
    (tmp_path / "free").mkdir()
    free = fitted(tiny_model, tmp_path / "free", "--model.consistency.retain.weight=1e-9", "--data.batch_size=3")
    assert found["val/retain/loss"][-1] < 0.5 * free["val/retain/loss"][-1]


def test_precomputed_scores_have_no_states(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.reference\.mode: precomputed keeps log-probabilities only"):
        fitted(tiny_model, tmp_path, "--model.consistency.retain.weight=1", "--model.reference.mode=precomputed")
