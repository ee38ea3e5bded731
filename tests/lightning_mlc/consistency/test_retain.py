"""Ordinary prompts stay where the reference has them: values by hand, the gradient, and whole steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, save_model, write_jsonl
from first_positions import next_tokens
from first_positions import observed as observed_tokens
from torch import Tensor

from lightning_mlc.commands.training import run
from lightning_mlc.consistency import Consistency, Needs, Observed, Retain
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


# ---- distributions ------------------------------------------------------------------------------------------


def of_logits(ours: Tensor, theirs: Tensor, present: Tensor, is_ordinary: Tensor | None = None) -> Observed:
    """``ours`` (B, L, K, V) and ``theirs`` (B, L, 1, V), each in an order of its own."""
    tables = next_tokens(ours, present), next_tokens(theirs, present, seed=1)
    return observed_tokens(tables[0], present, tables[1], is_ordinary=is_ordinary)


KL = Retain(distance="kl")


def test_divergence_by_hand() -> None:
    """Probabilities 1/2 and 1/2 have become 1/4 and 3/4 in one language, and are kept in the other."""
    theirs = torch.tensor([[[[0.5, 0.5]], [[0.75, 0.25]]]]).log()
    ours = torch.tensor([[[[0.25, 0.75]], [[0.75, 0.25]]]]).log()
    both = torch.ones(1, 2, dtype=torch.bool)
    moved = math.log(2) / 2 + math.log(2 / 3) / 2
    assert KL.losses(of_logits(ours, theirs, both)).tolist() == pytest.approx([moved / 2], abs=1e-6)
    assert KL.losses(of_logits(theirs, theirs, both)).tolist() == [0.0]


def test_divergence_is_its_definition_and_so_is_its_gradient() -> None:
    """Of the first position alone, although another term may need more; the reference gets no gradient."""
    ours, twin = (random(3, 3, 4, 6).requires_grad_() for _ in range(2))
    theirs = random(3, 3, 1, 6, seed=1).requires_grad_()
    found = KL.losses(of_logits(ours, theirs, PRESENT))
    wanted = theirs.detach()[:, :, 0].softmax(2)
    each = (wanted * (wanted / twin[:, :, 0].softmax(2)).log()).sum(2)
    expected = torch.stack([each[0].mean(), (each[1, 0] + each[1, 2]) / 2, 0 * each[2, 1]])
    torch.testing.assert_close(found, expected)
    assert found[2] == 0
    weights = torch.tensor([1.0, 2.0, 4.0])
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, twin.grad)
    assert theirs.grad is None
    assert torch.autograd.gradcheck(lambda logits: KL.losses(of_logits(logits, theirs, PRESENT)), (ours,))


def test_only_the_distributions_of_ordinary_prompts_are_kept() -> None:
    ours, theirs = random(3, 3, 1, 6).requires_grad_(), random(3, 3, 1, 6, seed=1)
    seen = of_logits(ours, theirs, PRESENT, is_ordinary=torch.tensor([False, True, True]))
    losses = KL.losses(seen.only(KL.rows))
    assert [loss > 0 for loss in losses.tolist()] == [False, True, False]
    (gradient,) = torch.autograd.grad(losses.sum(), ours)
    assert (gradient != 0).flatten(1).any(1).tolist() == [False, True, False]


def test_half_precision_and_ruled_out_tokens() -> None:
    """As some models do with the part of the vocabulary that is padding."""
    ours, theirs = (random(2, 2, 1, 50, seed=seed).to(torch.bfloat16) for seed in range(2))
    ours[..., 40:], theirs[..., 40:] = -math.inf, -math.inf
    both = torch.ones(2, 2, dtype=torch.bool)
    found = KL.losses(of_logits(ours, theirs, both))
    assert found.dtype == torch.float32
    exact = KL.losses(of_logits(ours[..., :40].double(), theirs[..., :40].double(), both))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)  # sums in float32


def test_what_the_distance_needs() -> None:
    assert KL.needs == Needs(reference=True, positions=1, reference_positions=1)
    assert Consistency(retain=Retain(weight=1, distance="kl")).needs.representations  # for mlc


# ---- whole runs ---------------------------------------------------------------------------------------------

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


SHARP = {"initializer_range": 0.3}
"""A random model with such weights has distributions that are far from uniform."""


@pytest.mark.parametrize(
    ("distance", "rate", "weights"), [pytest.param("squared", 1e-2, {}, marks=pytest.mark.slow), ("kl", 1e-3, SHARP)]
)
def test_a_run_stays_near_its_reference(tmp_path: Path, distance: str, rate: float, weights: dict[str, float]) -> None:
    """At first the policy is the reference. A large weight keeps it there."""
    model = save_model(tmp_path / "model", **weights)
    more = [f"--model.consistency.retain.distance={distance}", f"--model.optimizer.lr={rate}", "--data.batch_size=3"]
    (tmp_path / "kept").mkdir()
    found = fitted(model, tmp_path / "kept", "--model.consistency.retain.weight=100", *more)
    # Padded and packed rows of policy and reference are the same, and so are their results.
    assert found["train/retain/loss"][0] == 0
    assert found["train/retain/loss"][-1] > 0
    (tmp_path / "free").mkdir()
    free = fitted(model, tmp_path / "free", "--model.consistency.retain.weight=1e-9", *more)
    assert found["val/retain/loss"][-1] < 0.5 * free["val/retain/loss"][-1]


@pytest.mark.parametrize("distance", ["squared", "kl"])
def test_precomputed_scores_have_no_states_and_no_distributions(
    tiny_model: Path, tmp_path: Path, distance: str
) -> None:
    more = [f"--model.consistency.retain.distance={distance}", "--model.reference.mode=precomputed"]
    with pytest.raises(
        UserError, match=r"^model\.reference\.mode: precomputed keeps log-probabilities of responses only"
    ):
        fitted(tiny_model, tmp_path, "--model.consistency.retain.weight=1", *more)
