"""The contrast between prompts: values by hand, the formula with loops, its gradient, and what it keeps apart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.consistency import MLC, Contrast, Observed
from lightning_mlc.models.forward import Grid


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observed(rows: Tensor, present: Tensor | None = None) -> Observed:
    present = torch.ones(rows.shape[:2], dtype=torch.bool) if present is None else present
    nothing = torch.zeros(*present.shape, 3)
    return Observed(Grid(nothing, nothing, rows, present), None, rows, 0)


UNEVEN = torch.tensor([[True, True, True], [True, False, True], [False, True, True], [True, False, False]])
"""Four prompts in three languages. The last one has no translation, but is a candidate."""


def by_loops(rows: Tensor, present: Tensor, temperature: float) -> Tensor:
    losses = []
    for i, there in enumerate(present):
        own = there.nonzero().flatten().tolist()
        terms = []
        for a in own:
            for b in own:
                if a == b:
                    continue
                others = present[:, b].nonzero().flatten().tolist()
                cosines = torch.stack([F.cosine_similarity(rows[i, a], rows[j, b], dim=0) for j in others])
                terms.append(-F.log_softmax(cosines / temperature, dim=0)[others.index(i)])
        losses.append(torch.stack(terms).mean() if terms else rows[i].sum() * 0)
    return torch.stack(losses)


def test_values_by_hand() -> None:
    """Two prompts, east and north in both languages: cosines 1 with the own translation and 0 with the other."""
    rows = torch.tensor([[[2.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 0.5]]])
    found = Contrast(temperature=0.5).losses(observed(rows))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-2))] * 2)
    swapped = rows[:, :, [0, 1]].clone()
    swapped[:, 1] = swapped[:, 1].flip(0)  # each translation is that of the other prompt
    found = Contrast(temperature=0.5).losses(observed(swapped))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(2))] * 2)


def test_one_state_for_all_prompts_is_chance() -> None:
    """MLC is at its floor there, and this term at log n."""
    rows = torch.eye(6)[0].expand(5, 3, 6)  # without rounding, so that ties are ties
    assert Contrast().losses(observed(rows)).tolist() == pytest.approx([math.log(5)] * 5)
    assert MLC().metrics(observed(rows))["excess"].abs().max() < 1e-12
    measured = Contrast().metrics(observed(rows))
    assert measured["found"].tolist() == measured["chance"].tolist() == pytest.approx([1 / 5] * 5)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_it_is_its_formula_and_so_is_its_gradient(scale: float) -> None:
    """Also where all prompts are nearly one state."""
    ours, theirs = ((random(1, 1, 6) + scale * random(4, 3, 6, seed=1)).requires_grad_() for _ in range(2))
    found = Contrast(temperature=0.2).losses(observed(ours, UNEVEN))
    expected = by_loops(theirs, UNEVEN, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert found[3] == 0
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0])
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    assert ours.grad is not None
    assert bool((ours.grad[3, 0] != 0).any())  # as a candidate
    assert bool((ours.grad[~UNEVEN] == 0).all())


def test_gradient_of_finite_differences() -> None:
    rows = random(3, 3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: Contrast(temperature=0.3).losses(observed(r, UNEVEN[:3])), (rows,))


def test_what_stands_in_a_missing_row_does_not_matter() -> None:
    rows = random(4, 3, 5)
    spoilt = torch.where(UNEVEN[:, :, None], rows, float("nan")).requires_grad_()
    losses = Contrast().losses(observed(spoilt, UNEVEN))
    torch.testing.assert_close(losses, Contrast().losses(observed(rows, UNEVEN)))
    (gradient,) = torch.autograd.grad(losses.sum(), spoilt)
    assert bool(gradient.isfinite().all())


def test_a_language_that_no_prompt_has() -> None:
    present = UNEVEN.clone()
    present[:, 1] = False
    rows = random(4, 3, 5).requires_grad_()
    losses = Contrast().losses(observed(rows, present))
    torch.testing.assert_close(losses, by_loops(rows, present, 0.1))
    (gradient,) = torch.autograd.grad(losses.sum(), rows)
    assert bool(gradient.isfinite().all())


def test_one_prompt_has_nothing_to_compare() -> None:
    rows = random(1, 3, 5).requires_grad_()
    losses = Contrast().losses(observed(rows))
    assert losses.tolist() == [0.0]
    (gradient,) = torch.autograd.grad(losses.sum(), rows)
    assert gradient.abs().max() < 1e-15


def test_what_a_language_s_states_share_tells_no_prompts_apart() -> None:
    """Candidates are in one language, so states of the two languages may even be opposite."""
    rows = 0.1 * random(4, 1, 6).expand(4, 2, 6).clone()
    rows[:, 0] += 3 * torch.eye(6, dtype=torch.float64)[0]
    rows[:, 1] -= 3 * torch.eye(6, dtype=torch.float64)[0]
    assert bool((Contrast().metrics(observed(rows))["found"] > 0.5).all())


def test_found_counts_translations_that_are_the_closest() -> None:
    rows = torch.eye(3)[:, None].expand(3, 2, 3).clone()
    rows[0, 1] = rows[1, 0]  # the first prompt's translation is that of the second
    measured = Contrast().metrics(observed(rows))
    # From language 0: prompt 0 finds a cosine of 0 with everything, so a third; prompt 1 has a tie of two.
    # From language 1: prompt 0 finds prompt 1; prompts 1 and 2 find their own.
    assert measured["found"].tolist() == pytest.approx([(1 / 3 + 0) / 2, (1 / 2 + 1) / 2, 1])
    assert measured["chance"].tolist() == pytest.approx([1 / 3] * 3)


def test_descent_keeps_prompts_apart_where_mlc_alone_does_not_mind() -> None:
    """From one state for all prompts, with a little noise: MLC has nothing left to learn, the contrast has."""
    start = random(1, 1, 8) + 0.05 * random(4, 3, 8, seed=1)
    cosines = {}
    for name, terms in (("mlc", [MLC()]), ("both", [MLC(), Contrast()])):
        rows = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([rows], lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            torch.stack([term.losses(observed(rows)).sum() for term in terms]).sum().backward()
            optimizer.step()
        unit = F.normalize(rows.detach()[:, 0], dim=1)
        cosines[name] = float((unit @ unit.T)[~torch.eye(4, dtype=torch.bool)].mean())
        assert float(MLC().metrics(observed(rows))["explained_variance"].min()) > 0.98
    assert cosines["mlc"] > 0.98
    assert cosines["both"] < 0.5
