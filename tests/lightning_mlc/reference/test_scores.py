"""Looking scores up gives the right row, or NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mlc.data.batches import Batch, Normalizers
from lightning_mlc.models.forward import Grid
from lightning_mlc.reference.scores import ReferenceScores

NORMALIZERS = Normalizers(1.0, 1.0, 1.0, 1.0, 1.0)


def batch(keys: list[int], languages: int = 2) -> Batch:
    names = tuple(f"l{index}" for index in range(languages))
    return Batch(tuple(map(str, keys)), torch.tensor(keys), names, 0, (), (), NORMALIZERS)


def grid_of(keys: list[int], languages: int = 2, kinds: int = 3) -> Grid:
    """Scores whose digits show their origin: key, language, kind."""
    cells = torch.tensor(
        [[[-(100.0 * key + 10 * lang + kind) for kind in range(kinds)] for lang in range(languages)] for key in keys]
    )
    return Grid(cells, torch.ones_like(cells), None, torch.ones(len(keys), languages, dtype=torch.bool))


def scores(keys: list[int], languages: int | None = None) -> ReferenceScores:
    return ReferenceScores.of(batch(keys), grid_of(keys), languages)


def test_each_example_gets_its_own_scores_whatever_the_order() -> None:
    table = ReferenceScores.union([scores([7, 3]), scores([1, 9])])
    assert table.keys.tolist() == [1, 3, 7, 9]
    found = table.grid(batch([9, 1, 7]))
    assert torch.equal(found.logps, grid_of([9, 1, 7]).logps)
    assert torch.equal(found.tokens, grid_of([9, 1, 7]).tokens)
    assert found.present.all()


def test_what_was_never_scored_is_nan() -> None:
    found = scores([1, 3]).grid(batch([3, 2, 5]))
    assert found.logps[0].isfinite().all()
    assert found.logps[1:].isnan().all()
    assert not found.present[1:].any()
    source_alone = scores([1, 3], languages=1).grid(batch([3]))
    assert torch.equal(source_alone.logps[:, 0], grid_of([3]).logps[:, 0])
    assert source_alone.logps[:, 1].isnan().all()
    assert source_alone.present.tolist() == [[True, False]]


def test_of_an_example_that_is_there_twice_the_first_counts() -> None:
    again = scores([3])._replace(logps=torch.zeros(1, 2, 3))
    assert torch.equal(ReferenceScores.union([scores([3]), again]).logps, scores([3]).logps)
    assert torch.equal(ReferenceScores.union([again, scores([3, 1])]).logps[1], torch.zeros(2, 3))


def test_missing_and_none() -> None:
    none = ReferenceScores.union([])
    assert none.missing([4, 2]) == [4, 2]
    assert scores([2, 8]).missing([8, 4, 2]) == [4]
    assert ReferenceScores.union([none, scores([2])]).keys.tolist() == [2]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_score_of_a_response_of_another_length_is_not_taken(kind: int) -> None:
    """As with a cache that lacks a kind of response, or was cut differently: the loss shows it, so it is never
    silent."""
    policy = grid_of([1, 2])
    reference = grid_of([1, 2])
    tokens: Tensor = reference.tokens.clone()
    tokens[1, 0, kind] = 5
    found = policy.scores(kind, reference._replace(tokens=tokens), language=0)
    assert found.reference_logps is not None
    assert found.reference_logps[0] == policy.logps[0, 0, kind]
    assert found.reference_logps[1].isnan()
