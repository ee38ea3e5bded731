"""The plan of an epoch does not depend on how a step is divided."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_mlc.data.sampling import EvaluationBatches, MicroBatch, Sizes, TrainingBatches, plan_epoch
from lightning_mlc.data.windows import ByExamples, Division

COUNT = 23
SIZES = Sizes(
    response_tokens=np.arange(1, COUNT + 1),
    groups=np.arange(COUNT) % 3,
    ordinary_groups=np.arange(COUNT) % 4,
    chosen=np.arange(COUNT) % 2,
    rejected=np.arange(COUNT) % 5,
)


def windows(batch_size: int, accumulate: int, world: int, limit: int | float | None = None) -> list[list[MicroBatch]]:
    """Micro-batches of each optimizer step over all ranks, as Lightning would run them."""
    divisions = [Division(accumulate, world, rank) for rank in range(world)]
    plans = [plan_epoch(ByExamples(COUNT, batch_size, d, seed=0)(0), SIZES, d, limit) for d in divisions]
    assert len({len(plan) for plan in plans}) == 1, "ranks must take equally many steps"
    starts = range(0, len(plans[0]), accumulate)
    return [[micro for plan in plans for micro in plan[start : start + accumulate]] for start in starts]


CUTS = [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)]


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_has_the_same_steps(cut: tuple[int, int, int]) -> None:
    order = np.random.default_rng([0, 0]).permutation(COUNT).tolist()
    expected = [sorted(order[start : start + 4]) for start in range(0, COUNT, 4)]
    found = [sorted(i for micro in step for i in micro.indices) for step in windows(*cut)]
    assert found[:5] == expected[:5]
    # Of the last three examples, fewer than the number of processes are dropped, because each process needs one.
    last = [i for step in found[5:] for i in step]
    assert set(last) <= set(order[20:])
    assert 3 - len(last) < cut[2]


@pytest.mark.parametrize("cut", CUTS)
def test_totals_are_those_of_the_whole_step(cut: tuple[int, int, int]) -> None:
    share = cut[1] * cut[2]
    for step in windows(*cut):
        taken = [i for micro in step for i in micro.indices]
        for micro in step:
            assert micro.indices, "a micro-batch must not be empty"
            assert micro.normalizers.examples * share == pytest.approx(len(taken))
            assert micro.normalizers.response_tokens * share == pytest.approx(sum(i + 1 for i in taken))
            assert micro.normalizers.groups * share == pytest.approx(sum(i % 3 for i in taken))
            assert micro.normalizers.ordinary_groups * share == pytest.approx(sum(i % 4 for i in taken))
            assert micro.normalizers.chosen * share == pytest.approx(sum(i % 2 for i in taken))
            assert micro.normalizers.rejected * share == pytest.approx(sum(i % 5 for i in taken))
            assert micro.normalizers.responses == micro.normalizers.chosen + micro.normalizers.rejected


@pytest.mark.parametrize("limit", [5, 0.5])
def test_a_limited_epoch_has_right_totals_in_its_last_step(limit: int | float) -> None:
    steps = windows(1, 4, 1, limit)
    micro = sum(len(step) for step in steps)
    assert micro == (5 if limit == 5 else 11)
    taken = [i for m in steps[-1] for i in m.indices]
    assert steps[-1][0].normalizers.examples * 4 == len(taken)
    # Lightning applies the limit to the length too; if it were applied before, it would count twice.
    assert len(TrainingBatches(SIZES, ByExamples(COUNT, 1, Division(4), seed=0), Division(4), limit)) == COUNT


def test_epochs_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrainingBatches(SIZES, ByExamples(COUNT, 2, Division(), seed), progress=lambda: (epoch, 0))
        assert len(list(sampler)) == len(sampler) == 12
        return [i for micro in sampler for i in micro.indices]

    assert sorted(order(1, 0)) == list(range(COUNT))
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_a_resumed_epoch_goes_on_with_the_next_micro_batch() -> None:
    cut = ByExamples(COUNT, 2, Division(), seed=0)
    whole, rest = (list(TrainingBatches(SIZES, cut, progress=lambda done=done: (3, done))) for done in (0, 5))
    assert rest == whole[5:]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 16])
def test_evaluation_sees_all_on_any_number_of_processes(world: int) -> None:
    ranks = [[m.indices for m in EvaluationBatches(SIZES, 4, world, rank)] for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert {i for rank in ranks for indices in rank for i in indices} == set(range(COUNT))
