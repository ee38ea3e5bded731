"""Extractor and centring."""

from __future__ import annotations

import torch

from lightning_mlc.consistency import Consistency, Representation


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_extractors() -> None:
    trained, frozen, none = (
        Representation(Consistency(extractor=kind, extractor_dim=5), 8)  # type: ignore[arg-type]
        for kind in ("linear", "frozen", "none")
    )
    hidden = states(2, 3, 8)
    assert trained.extract(hidden).shape == (2, 3, 5)
    assert all(p.requires_grad for p in trained.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert len(list(frozen.parameters())) == 2
    assert torch.equal(none.extract(hidden), hidden)
    assert list(none.parameters()) == []


def test_runs_in_full_precision_under_autocast() -> None:
    term = Representation(Consistency(extractor_dim=4), 8)
    hidden = states(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = term.extract(hidden)
    assert torch.equal(inside, term.extract(hidden))


def test_mean_follows_optimizer_steps_and_not_micro_batches() -> None:
    hidden = states(4, 3, 8)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    whole, cut = (Representation(Consistency(center=True, extractor="none"), 8) for _ in range(2))
    assert torch.equal(whole.extract(hidden), hidden)  # no states seen yet, so nothing is subtracted
    whole.observe(hidden, mask)
    whole.fold_mean()
    for part in (slice(0, 1), slice(1, 4)):
        cut.observe(hidden[part], mask[part])
        assert torch.equal(cut.mean, torch.zeros(8))  # constant within a step
    cut.fold_mean()
    torch.testing.assert_close(cut.mean, whole.mean)
    torch.testing.assert_close(whole.mean, hidden[mask].mean(0))
    torch.testing.assert_close(whole.extract(hidden), hidden - whole.mean)
    # later steps move it by a tenth
    first = whole.mean.clone()
    whole.observe(hidden + 1, mask)
    whole.fold_mean()
    torch.testing.assert_close(whole.mean, 0.9 * first + 0.1 * (first + 1))
    # a step without states does not change it
    second = whole.mean.clone()
    whole.fold_mean()
    assert torch.equal(whole.mean, second)
