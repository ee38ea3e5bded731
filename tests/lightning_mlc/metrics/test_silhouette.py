"""Silhouettes by hand, against loops and scikit-learn; and the layer that they choose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mlc.metrics import LayerChoice, Silhouettes, choose_layer, silhouette, silhouettes

NAN = math.nan


def apart(*places: float) -> Tensor:
    """Distances of places on a line."""
    line = torch.tensor(places, dtype=torch.float64)
    return (line[:, None] - line).abs()


def by_loops(vectors: list[list[float]], labels: list[int]) -> float:
    """The mean silhouette with cosine distances, point by point in plain Python."""

    def distance(first: list[float], second: list[float]) -> float:
        return 1 - sum(x * y for x, y in zip(first, second, strict=True)) / (math.hypot(*first) * math.hypot(*second))

    found = []
    for index, vector in enumerate(vectors):
        means = {}
        for label in set(labels):
            others = [v for j, v in enumerate(vectors) if labels[j] == label and j != index]
            if others:
                means[label] = sum(distance(vector, other) for other in others) / len(others)
        within = means.pop(labels[index], None)
        if within is None:
            found.append(0.0)
            continue
        between = min(means.values())
        found.append((between - within) / max(within, between))
    return sum(found) / len(found)


def test_a_silhouette_by_hand() -> None:
    found = silhouette(apart(0, 1, 4, 6), torch.tensor([7, 7, 3, 3]))
    assert float(found) == pytest.approx((4 / 5 + 3 / 4 + 1.5 / 3.5 + 3.5 / 5.5) / 4)


def test_the_other_cluster_is_the_nearest_one() -> None:
    # The point at 0 is 10 from the last cluster and 3.5 from the middle one; without the nearest it would be 9 / 10.
    found = silhouette(apart(0, 1, 3, 4, 10, 10), torch.tensor([0, 0, 1, 1, 2, 2]))
    points = [2.5 / 3.5, 1.5 / 2.5, 1.5 / 2.5, 2.5 / 3.5, 1, 1]
    assert float(found) == pytest.approx(sum(points) / 6)


def test_a_point_alone_and_points_at_one_place() -> None:
    # The one that is alone counts as 0. Of the others, a = 2, b = 5 and 3.
    assert float(silhouette(apart(0, 2, 5), torch.tensor([0, 0, 1]))) == pytest.approx((3 / 5 + 1 / 3) / 3)
    assert float(silhouette(apart(1, 1, 1, 1), torch.tensor([0, 0, 1, 1]))) == 0


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]], ids=["one cluster", "each point a cluster"])
def test_without_clusters_it_is_undefined(labels: list[int]) -> None:
    assert math.isnan(silhouette(apart(0, 1, 2), torch.tensor(labels)))


def crossed(prompt: float, language: float, common: float = 0.0) -> Tensor:
    """(2, 2, 3): two prompts that differ along one axis, in two languages that differ along another."""
    sign = torch.tensor([1.0, -1.0])
    states = torch.full((2, 2, 3), common)
    states[..., 0] += prompt * sign[:, None]
    states[..., 1] += language * sign
    return states


def test_by_prompt_and_by_language_by_hand() -> None:
    """Unit states are (±2, ±1) / √5: distances are 0.4 in a prompt, 1.6 in a language, and 2 across both."""
    found = silhouettes(crossed(2, 1), torch.ones(2, 2).bool())
    assert float(found.by_prompt) == pytest.approx((1.8 - 0.4) / 1.8)
    assert float(found.by_language) == pytest.approx((1.2 - 1.6) / 1.6)
    turned = silhouettes(crossed(1, 2), torch.ones(2, 2).bool())
    assert (float(turned.by_prompt), float(turned.by_language)) == pytest.approx(
        (float(found.by_language), float(found.by_prompt))
    )


def test_a_common_direction_changes_nothing() -> None:
    alone, shared = (silhouettes(crossed(2, 1, common), torch.ones(2, 2).bool()) for common in (0.0, 1000.0))
    # In float32 the common part leaves 1e-7 of 1000 for each number, which is 1e-4.
    for name in Silhouettes._fields:
        assert float(getattr(shared, name)) == pytest.approx(float(getattr(alone, name)), abs=1e-3)


def random_states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 1, 6, generator=generator) + torch.randn(9, 4, 6, generator=generator)
    mask = torch.rand(9, 4, generator=generator) < 0.7
    mask[0] = torch.tensor([True, False, False, False])  # in one language, so it takes no part
    return states, mask


def taking_part(states: Tensor, mask: Tensor) -> tuple[list[list[float]], list[int], list[int]]:
    cells = [(b, k) for b in range(9) for k in range(4) if mask[b, k] and int(mask[b].sum()) >= 2]
    rows = torch.stack([states[cell] for cell in cells]).double()
    return (rows - rows.mean(0)).tolist(), [b for b, _ in cells], [k for _, k in cells]


def test_silhouettes_are_those_of_loops() -> None:
    states, mask = random_states()
    found = silhouettes(torch.where(mask[:, :, None], states, NAN), mask)  # whatever a missing state holds
    vectors, prompts, languages = taking_part(states, mask)
    assert float(found.by_prompt) == pytest.approx(by_loops(vectors, prompts), rel=1e-12)
    assert float(found.by_language) == pytest.approx(by_loops(vectors, languages), rel=1e-12)


def test_silhouettes_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    states, mask = random_states()
    found = silhouettes(states, mask)
    vectors, prompts, languages = taking_part(states, mask)
    for own, labels in ((found.by_prompt, prompts), (found.by_language, languages)):
        assert float(own) == pytest.approx(metrics.silhouette_score(vectors, labels, metric="cosine"), rel=1e-9)


def test_equal_states_have_no_silhouette() -> None:
    """As at the embeddings, where all states are of the same token: what is left after centring is rounding."""
    same = torch.randn(32, generator=torch.Generator().manual_seed(0)).expand(5, 3, 32)
    assert all(math.isnan(value) for value in silhouettes(same, torch.ones(5, 3).bool()))


def test_one_prompt_or_none_has_no_silhouette_by_prompt() -> None:
    states = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert math.isnan(silhouettes(states, torch.ones(1, 3).bool()).by_prompt)
    assert math.isnan(silhouettes(states, torch.zeros(1, 3).bool()).by_prompt)


def test_states_that_are_not_finite_show() -> None:
    states = crossed(2, 1)
    states[0, 0, 0] = NAN
    assert all(math.isnan(value) for value in silhouettes(states, torch.ones(2, 2).bool()))


def test_the_layer_with_the_largest_difference() -> None:
    assert choose_layer([0.9, 0.1, 0.5, 0.4], [0.0, 0.0, 0.1, 0.2]) == 2  # not 0, the embeddings
    assert choose_layer([0.0, 0.5, 0.2, 0.1], [0.0, 0.9, 0.1, 0.1]) == 2  # by prompt alone it would be 1
    assert choose_layer([0.0, 0.25, 0.5, 0.25], [0.0, 0.0, 0.25, 0.5]) == 2  # a tie: the later one
    assert choose_layer([NAN, NAN, 0.1], [NAN, 0.0, 0.3]) == 2  # an undefined layer takes no part
    assert choose_layer([0.5, NAN], [0.1, NAN]) is None


def test_a_middle_layer_of_known_states() -> None:
    """Layers 1 and 3 differ more in language, layer 2 in prompt."""
    layers = [crossed(9, 1), crossed(1, 2, 50.0), crossed(2, 1, 5.0), crossed(1, 3, 100.0)]
    choice = LayerChoice.of(torch.stack(layers, dim=2), torch.ones(2, 2).bool())
    assert choice.layer == 2
    assert choice.by_prompt[2] == pytest.approx(7 / 9, abs=1e-5)  # float32 beside a common part of 5
    assert choice.reason == "silhouette by prompt 0.778, by language -0.250: the largest difference"
