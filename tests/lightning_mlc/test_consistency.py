"""The consistency term: extractor, centring, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mlc.consistency import MLC, Consistency
from lightning_mlc.errors import UserError
from mlc_kernels import mlc_loss


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_extractors() -> None:
    trained, frozen, none = (
        Consistency(MLC(extractor=kind, extractor_dim=5), 8)  # type: ignore[arg-type]
        for kind in ("linear", "frozen", "none")
    )
    hidden = states(2, 3, 8)
    assert trained.extract(hidden).shape == (2, 3, 5)
    assert all(p.requires_grad for p in trained.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert len(list(frozen.parameters())) == 2
    assert torch.equal(none.extract(hidden), hidden)
    assert list(none.parameters()) == []


def test_loss_is_the_operators_on_extracted_states() -> None:
    term = Consistency(MLC(temperature=0.3, scale="none", extractor_dim=4), 8)
    hidden, mask = states(2, 3, 8), torch.tensor([[True, True, True], [True, False, False]])
    weight, bias = term.extractor.weight, term.extractor.bias  # type: ignore[union-attr]
    expected = mlc_loss(hidden @ weight.T + bias, mask, temperature=0.3, scale="none", reduction="none")  # type: ignore[operator]
    torch.testing.assert_close(term.loss(term.extract(hidden), mask), expected)
    assert term.loss(term.extract(hidden), mask)[1] == 0


def test_runs_in_full_precision_under_autocast() -> None:
    term = Consistency(MLC(extractor_dim=4), 8)
    hidden = states(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = term.extract(hidden)
    assert torch.equal(inside, term.extract(hidden))


def test_mean_follows_optimizer_steps_and_not_micro_batches() -> None:
    hidden = states(4, 3, 8)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    whole, cut = (Consistency(MLC(center=True, extractor="none"), 8) for _ in range(2))
    assert torch.equal(whole.extract(hidden), hidden)  # nothing seen yet, nothing subtracted
    whole.observe(hidden, mask)
    whole.fold_mean()
    for part in (slice(0, 1), slice(1, 4)):
        cut.observe(hidden[part], mask[part])
        assert torch.equal(cut.mean, torch.zeros(8))  # constant inside a step
    cut.fold_mean()
    torch.testing.assert_close(cut.mean, whole.mean)
    torch.testing.assert_close(whole.mean, hidden[mask].mean(0))
    torch.testing.assert_close(whole.extract(hidden), hidden - whole.mean)
    # Later steps move it by a tenth.
    first = whole.mean.clone()
    whole.observe(hidden + 1, mask)
    whole.fold_mean()
    torch.testing.assert_close(whole.mean, 0.9 * first + 0.1 * (first + 1))
    # A step without states leaves it.
    second = whole.mean.clone()
    whole.fold_mean()
    assert torch.equal(whole.mean, second)


def test_steps_with_the_term() -> None:
    assert [MLC(every_n_steps=3).is_on(step) for step in range(5)] == [True, False, False, True, False]
    assert not MLC(weight=0).is_on(0)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": -1},
        {"weight": float("nan")},
        {"temperature": 0.0},
        {"temperature": 1e6},
        {"extractor_dim": 1},
        {"every_n_steps": 0},
        {"extractor": "none", "extractor_lr": 1e-4},
        {"extractor_lr": -1.0},
    ],
)
def test_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.mlc\." + next(reversed(change))):
        MLC(**change)
