"""Each term against values computed by hand, and against its authors' formula, written with loops."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from first_positions import next_tokens
from torch import Tensor

from lightning_mlc.consistency import (
    DCO,
    MLC,
    MPO,
    ConsistencyTerm,
    Contrast,
    Observed,
    PairwiseCosine,
    SelfDistillation,
    SourceCosine,
)
from lightning_mlc.models.forward import Grid
from mlc_kernels import mlc_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_representations(rows: Tensor, present: Tensor, source: int = 0) -> Observed:
    logps = torch.zeros(*present.shape, 2)
    return Observed(Grid(logps, logps, None, present), None, rows, source)


def of_responses(
    policy: Tensor,
    reference: Tensor,
    present: Tensor,
    tokens: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
    source: int = 0,
) -> Observed:
    """``policy`` and ``reference`` (B, L, 2) log-probabilities; ``pooled`` (B, 2, H) of both."""
    tokens = torch.ones_like(policy) if tokens is None else tokens
    ours, theirs = (None, None) if pooled is None else pooled
    where = present[:, :, None]
    grids = [
        Grid(torch.where(where, logps, 0.0), torch.where(where, tokens, 0.0), None, present, states)
        for logps, states in ((policy, ours), (reference, theirs))
    ]
    return Observed(grids[0], grids[1], None, source)


def with_logits(observed: Observed, logits: Tensor) -> Observed:
    """``logits`` (B, L, K, V) of the policy at the first positions."""
    return observed._replace(policy=observed.policy._replace(next_tokens=next_tokens(logits, observed.present)))


PRESENT = torch.tensor([[True, True, True, True], [True, False, True, False], [True, False, False, False]])
"""Three prompts: in all four languages, in two languages, and only in the source language."""


# ---- representations ------------------------------------------------------------------------------------


def test_mlc_is_the_operators_loss() -> None:
    rows = random(3, 4, 5)
    found = MLC(temperature=0.3, scale="none").losses(of_representations(rows, PRESENT))
    expected = mlc_loss(rows, PRESENT, temperature=0.3, scale="none", reduction="none")
    torch.testing.assert_close(found, expected)
    assert found[2] == 0


def test_cosines_by_hand() -> None:
    """Three directions in the plane, east, north and west, with cosines 0, 0 and -1."""
    rows = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert PairwiseCosine().losses(of_representations(rows, everywhere)).tolist() == pytest.approx([(1 + 2 + 1) / 3])
    for source, expected in enumerate([(1 + 2) / 2, (1 + 1) / 2, (2 + 1) / 2]):
        found = SourceCosine().losses(of_representations(rows, everywhere, source))
        assert found.tolist() == pytest.approx([expected])
    without_west = torch.tensor([[True, True, False]])
    assert PairwiseCosine().losses(of_representations(rows, without_west)).tolist() == pytest.approx([1.0])


def pairwise_by_loops(rows: Tensor, present: Tensor) -> Tensor:
    losses = []
    for prompt, there in zip(rows, present, strict=True):
        pairs = list(combinations(there.nonzero().flatten().tolist(), 2))
        distances = [1 - F.cosine_similarity(prompt[i], prompt[j], dim=0) for i, j in pairs]
        losses.append(torch.stack(distances).mean() if distances else prompt.sum() * 0)
    return torch.stack(losses)


def source_by_loops(rows: Tensor, present: Tensor, detach: bool) -> Tensor:
    losses = []
    for prompt, there in zip(rows, present, strict=True):
        source = prompt[0].detach() if detach else prompt[0]
        targets = there.nonzero().flatten().tolist()[1:]
        distances = [1 - F.cosine_similarity(prompt[i], source, dim=0) for i in targets]
        losses.append(torch.stack(distances).mean() if distances else prompt.sum() * 0)
    return torch.stack(losses)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_cosine_terms_and_their_gradients(scale: float) -> None:
    """Also if all rows are nearly equal and their differences small."""
    for term, loops in (
        (PairwiseCosine(), lambda r: pairwise_by_loops(r, PRESENT)),
        (SourceCosine(), lambda r: source_by_loops(r, PRESENT, True)),
        (SourceCosine(detach_source=False), lambda r: source_by_loops(r, PRESENT, False)),
    ):
        assert isinstance(term, ConsistencyTerm)
        ours, theirs = ((random(3, 1, 6) + scale * random(3, 4, 6, seed=1)).requires_grad_() for _ in range(2))
        found, expected = term.losses(of_representations(ours, PRESENT)), loops(theirs)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-14)
        weights = torch.tensor([1.0, 2.0, 4.0])
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)


def test_a_detached_source_gets_no_gradient() -> None:
    for detach in (True, False):
        rows = random(3, 4, 5).requires_grad_()
        SourceCosine(detach_source=detach).losses(of_representations(rows, PRESENT, source=2)).sum().backward()
        assert rows.grad is not None
        assert bool((rows.grad[:, 2] == 0).all()) is detach
        assert bool((rows.grad[0, [0, 1, 3]] != 0).all())


def test_what_stands_in_a_missing_row_does_not_matter() -> None:
    rows = random(3, 4, 5)
    spoilt = torch.where(PRESENT[:, :, None], rows, float("nan")).requires_grad_()
    for term in (PairwiseCosine(), SourceCosine()):
        losses = term.losses(of_representations(spoilt, PRESENT))
        torch.testing.assert_close(losses, term.losses(of_representations(rows, PRESENT)))
        (gradient,) = torch.autograd.grad(losses.sum(), spoilt)
        assert bool(gradient.isfinite().all())


# ---- responses ------------------------------------------------------------------------------------------


def test_mpo_by_hand() -> None:
    """Gaps per token: source -1/2 + 4/4 = 0.5 in the reference; targets -2/2 + 6/2 = 2 and -3/1 + 2/2 = -2."""
    policy = torch.tensor([[[-9.0, -9.0], [-2.0, -6.0], [-3.0, -2.0]]])
    reference = torch.tensor([[[-1.0, -4.0], [-9.0, -9.0], [-9.0, -9.0]]])
    tokens = torch.tensor([[[2.0, 4.0], [2.0, 2.0], [1.0, 2.0]]])
    pooled = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 4.0]]])
    observed = of_responses(policy, reference, torch.ones(1, 3, dtype=torch.bool), tokens, pooled)
    # Targets 1 and -1 at a beta of 0.5: (1 - 0.5)^2 and (-1 - 0.5)^2.
    gap, constraint = (0.25 + 2.25) / 2, (0 + 1 + 9 + 0) / 4
    term = MPO(beta=0.5, constraint=0.1)
    assert term.losses(observed).tolist() == pytest.approx([gap + 0.1 * constraint])
    assert MPO(beta=0.5, constraint=0.0).losses(observed).tolist() == pytest.approx([gap])
    parts = {name: values.tolist() for name, values in term.metrics(observed).items()}
    assert parts == {"gap": pytest.approx([gap]), "constraint": pytest.approx([constraint])}


def test_mpo_of_one_target_is_the_authors_loss() -> None:
    """The authors' batch consists of pairs (source, target), and their losses are means over the batch."""
    policy, reference = random(5, 2, 2), random(5, 2, 2, seed=1)
    tokens = 1 + random(5, 2, 2, seed=2).abs().round()
    ours, theirs = random(5, 2, 7, seed=3), random(5, 2, 7, seed=4)
    present = torch.ones(5, 2, dtype=torch.bool)
    found = MPO(beta=1.5).losses(of_responses(policy, reference, present, tokens, (ours, theirs))).mean()
    means, reference_means = policy / tokens, reference / tokens
    target_gap = means[:, 1, 0] - means[:, 1, 1]
    source_gap = reference_means[:, 0, 0] - reference_means[:, 0, 1]
    expected = F.mse_loss(1.5 * target_gap, source_gap) + F.mse_loss(ours.flatten(0, 1), theirs.flatten(0, 1))
    torch.testing.assert_close(found, expected)


def test_mpo_leaves_prompts_without_translations_alone() -> None:
    pooled = random(3, 2, 4), random(3, 2, 4, seed=1)
    observed = of_responses(random(3, 4, 2), random(3, 4, 2, seed=2), PRESENT, pooled=pooled)
    losses = MPO().losses(observed)
    assert losses[2] == 0
    assert bool((losses[:2] > 0).all())


def dco_by_loops(policy: Tensor, reference: Tensor, present: Tensor, beta: float) -> Tensor:
    """The authors' loss of two languages (the source first), averaged over pairs; beta is 1 for pairs of targets."""
    losses = []
    for p, q, there in zip(policy, reference, present, strict=True):
        pairs = []
        for first, second in combinations(there.nonzero().flatten().tolist(), 2):
            strength = beta if first == 0 else 1.0
            offset_1, offset_2 = (q[i, 0] - q[i, 1] for i in (first, second))
            reward_1, reward_2 = (p[i, 0] - q[i, 0] - p[i, 1] + q[i, 1] for i in (first, second))
            pairs.append((reward_1 - offset_2 / strength).abs() + (reward_2 - strength * offset_1).abs())
        losses.append(torch.stack(pairs).mean() if pairs else p.sum() * 0)
    return torch.stack(losses)


def test_dco_by_hand() -> None:
    """Reference margins 3 and -1, policy margins 4 and 1, so rewards 1 and 2."""
    policy = torch.tensor([[[-1.0, -5.0], [-2.0, -3.0]]])
    reference = torch.tensor([[[-1.0, -4.0], [-3.0, -2.0]]])
    observed = of_responses(policy, reference, torch.ones(1, 2, dtype=torch.bool))
    assert DCO().losses(observed).tolist() == pytest.approx([abs(1 + 1) + abs(2 - 3)])
    assert DCO(beta=2.0).losses(observed).tolist() == pytest.approx([abs(1 + 0.5) + abs(2 - 6)])
    assert DCO().metrics(observed)["agreement"].tolist() == [1.0]
    assert DCO().metrics(observed._replace(policy=observed.reference))["agreement"].tolist() == [0.0]  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [1.0, 1.3])
def test_dco_and_its_gradient(beta: float) -> None:
    reference = random(3, 4, 2, seed=1)
    ours, theirs = (random(3, 4, 2).requires_grad_() for _ in range(2))
    found = DCO(beta=beta).losses(of_responses(ours, reference, PRESENT))
    expected = dco_by_loops(theirs, reference, PRESENT, beta)
    torch.testing.assert_close(found, expected)
    assert found[2] == 0
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_dco_does_not_know_which_response_was_chosen() -> None:
    policy, reference = random(3, 4, 2), random(3, 4, 2, seed=1)
    swapped = of_responses(policy.flip(2), reference.flip(2), PRESENT)
    torch.testing.assert_close(DCO().losses(swapped), DCO().losses(of_responses(policy, reference, PRESENT)))


# ---- all ------------------------------------------------------------------------------------------------

TERMS: dict[str, ConsistencyTerm] = {
    "mlc": MLC(),
    "contrast": Contrast(temperature=0.3),
    "pairwise_cosine": PairwiseCosine(),
    "source_cosine": SourceCosine(),
    "mpo": MPO(beta=1.5),
    "dco": DCO(beta=1.5),
    "self_distillation": SelfDistillation(positions=3),
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_order_of_prompts_and_languages_does_not_matter(term: ConsistencyTerm) -> None:
    rows, policy, reference = random(3, 4, 5), random(3, 4, 2), random(3, 4, 2, seed=1)
    pooled, logits = (random(3, 2, 6), random(3, 2, 6, seed=1)), random(3, 4, 3, 7)
    prompts, languages = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])  # the source comes third
    observed = of_responses(policy, reference, PRESENT, pooled=pooled)._replace(representations=rows)
    moved = of_responses(
        policy[prompts][:, languages],
        reference[prompts][:, languages],
        PRESENT[prompts][:, languages],
        pooled=(pooled[0][prompts], pooled[1][prompts]),
        source=2,
    )._replace(representations=rows[prompts][:, languages])
    observed, moved = with_logits(observed, logits), with_logits(moved, logits[prompts][:, languages])
    torch.testing.assert_close(term.losses(moved), term.losses(observed)[prompts])


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize(("rows", "chosen"), [("harmful", 1), ("ordinary", 0)])
def test_rows_of_another_kind_are_left_out(term: ConsistencyTerm, rows: Any, chosen: int) -> None:
    """Two prompts with translations. What is left is what the chosen one alone would have."""
    policy, reference, states = random(2, 4, 2), random(2, 4, 2, seed=1), random(2, 4, 5)
    pooled = random(2, 2, 6), random(2, 2, 6, seed=1)
    observed = of_responses(policy, reference, PRESENT[:2], pooled=pooled)
    logits = random(2, 4, 3, 7)
    observed = with_logits(observed, logits)._replace(representations=states, is_ordinary=torch.tensor([True, False]))
    own = slice(chosen, chosen + 1)
    alone = of_responses(policy[own], reference[own], PRESENT[own], pooled=(pooled[0][own], pooled[1][own]))
    alone = with_logits(alone, logits[own])
    found = term.losses(observed.only(rows))
    assert found[1 - chosen] == 0
    torch.testing.assert_close(found[own], term.losses(alone._replace(representations=states[own])))
    assert observed.only("all") is observed


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_nothing_to_compare_is_a_loss_of_zero_with_a_gradient_of_zero(term: ConsistencyTerm) -> None:
    present = PRESENT[2:]
    rows, policy, logits = (random(1, 4, *more).requires_grad_() for more in ((5,), (2,), (3, 7)))
    pooled = random(1, 2, 6), random(1, 2, 6, seed=1)
    observed = of_responses(policy, random(1, 4, 2, seed=1), present, pooled=pooled)._replace(representations=rows)
    losses = term.losses(with_logits(observed, logits))
    assert losses.tolist() == [0.0]
    losses.sum().backward()
    gradients = [part.grad for part in (rows, policy, logits) if part.grad is not None]
    assert len(gradients) == 1
    assert bool((gradients[0] == 0).all())
