"""How alike different prompts are: values by hand, micro-batches, and when a warning comes."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.consistency import Observed
from lightning_mlc.consistency.collapse import (
    CollapseWatch,
    mean_prompt_cosine,
    prompt_cosines,
    prompt_sums,
    sums_of_step,
)
from lightning_mlc.models.forward import Grid


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(*batches: tuple[Tensor, Tensor]) -> float:
    return float(mean_prompt_cosine(torch.stack([prompt_sums(*batch) for batch in batches]).sum(0)))


def test_cosines_by_hand() -> None:
    """East, north and west in one language, with cosines 0, -1 and 0; two equal states of other lengths in another."""
    states = torch.tensor([[[2.0, 0.0], [1.0, 1.0]], [[0.0, 0.5], [3.0, 3.0]], [[-4.0, 0.0], [math.nan, 0.0]]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    assert mean((states[:, :1], mask[:, :1])) == pytest.approx(-1 / 3)
    assert mean((states[:, 1:], mask[:, 1:])) == pytest.approx(1)
    assert mean((states, mask)) == pytest.approx((0 - 1 + 0 + 1) / 4)


def test_pairs_are_those_of_different_prompts_in_one_language() -> None:
    states, mask = random(5, 3, 4), torch.ones(5, 3, dtype=torch.bool)
    mask[0, 1] = mask[3, 2] = mask[4, 2] = False
    expected = [
        float(F.cosine_similarity(states[i, language], states[j, language], dim=0))
        for language in range(3)
        for i, j in itertools.combinations(range(5), 2)
        if mask[i, language] and mask[j, language]
    ]
    assert mean((states, mask)) == pytest.approx(sum(expected) / len(expected), abs=1e-14)
    parts = [(states[part], mask[part]) for part in (slice(0, 1), slice(1, 4), slice(4, 5))]
    assert mean(*parts) == pytest.approx(sum(expected) / len(expected), abs=1e-14)


def test_translations_alone_are_no_pair() -> None:
    """Whatever the rounding of the unit vectors is."""
    for seed in range(20):
        states, mask = random(1, 4, 30, seed=seed), torch.ones(1, 4, dtype=torch.bool)
        assert prompt_cosines(prompt_sums(states, mask))[1] == 0
        assert math.isnan(mean((states, mask)))


def test_a_step_has_both_states() -> None:
    states, extracted, present = random(4, 3, 6), random(4, 3, 2, seed=1), torch.ones(4, 3, dtype=torch.bool)
    nothing = torch.zeros(4, 3, 3)
    found = sums_of_step(Observed(Grid(nothing, nothing, states, present), None, extracted, 0))
    assert set(found) == {"mlc/between_prompts", "mlc/raw/between_prompts"}
    torch.testing.assert_close(found["mlc/between_prompts"], prompt_sums(extracted, present))
    torch.testing.assert_close(found["mlc/raw/between_prompts"], prompt_sums(states, present))


def test_states_that_are_nearly_one_keep_their_digits() -> None:
    """The distance is the square of the scale, 1e-10, and float64 keeps six digits of it."""
    states = torch.ones(6, 1, 8, dtype=torch.float64) + 1e-5 * random(6, 1, 8)
    distance = 1 - mean((states, torch.ones(6, 1, dtype=torch.bool)))
    pairs = [
        float((F.normalize(states[i, 0], dim=0) - F.normalize(states[j, 0], dim=0)).square().sum()) / 2
        for i, j in itertools.combinations(range(6), 2)
    ]
    assert distance == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


def logged(variance: float, cosine: float) -> dict[str, float]:
    return {"mlc/raw/explained_variance": variance, "mlc/raw/between_prompts": cosine, "loss": 1.0}


def test_one_warning_where_prompts_and_translations_become_one(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch("do something")
    with caplog.at_level(logging.WARNING):
        for values in ({}, {"mlc/raw/explained_variance": 1.0}, logged(0.9, 0.8), logged(0.99, 0.9), logged(0.9, 0.99)):
            watch.look(values)
        assert caplog.messages == []
        for _ in range(2):
            watch.look(logged(0.995, 0.99))
    (message,) = caplog.messages
    assert "is 0.990 (0.800 at first), and the explained variance of translations is 0.995" in message
    assert message.endswith("do something")


def test_a_common_direction_is_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    """All states of some models are alike before training. They collapse where the rest of their distance goes."""
    watch = CollapseWatch("do something")
    with caplog.at_level(logging.WARNING):
        for cosine in (0.99, 0.991, 0.995):
            watch.look(logged(0.99, cosine))
        assert caplog.messages == []
        watch.look(logged(0.99, 0.998))
    assert len(caplog.messages) == 1
