"""Examples divided into micro-batches by tokens: nothing is lost or exceeds the budget, for any number of processes."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from lightning_mlc.data.sampling import Sizes, plan_epoch
from lightning_mlc.data.windows import ByTokens, Division, even_parts, fewest_parts

LAYOUTS = {
    count: [Division(count // world, world) for world in range(1, count + 1) if count % world == 0]
    for count in (1, 4, 6)
}


def all_cuts(count: int, parts: int) -> list[list[int]]:
    """All ways to cut a sequence of ``count`` into this many consecutive parts, none empty."""
    return [[0, *inner, count] for inner in combinations(range(1, count), parts - 1)]


def fits(tokens: np.ndarray, bounds: list[int], budget: int) -> bool:
    return all(tokens[start:end].sum() <= budget for start, end in pairwise(bounds))


def test_fewest_parts_are_the_fewest_of_all_cuts() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        tokens = generator.integers(1, 20, size=generator.integers(1, 9))
        budget = int(generator.integers(tokens.max(), 50))
        count = len(tokens)
        possible = [n for n in range(1, count + 1) if any(fits(tokens, c, budget) for c in all_cuts(count, n))]
        assert fewest_parts(tokens, budget) == possible[0]
        for parts in possible:
            bounds = even_parts(tokens, budget, parts)
            assert bounds in all_cuts(count, parts)
            assert fits(tokens, bounds, budget)


def test_parts_are_even() -> None:
    assert even_parts(np.full(6, 1), budget=6, parts=3) == [0, 2, 4, 6]
    # 5, then 3 instead of 8 of the 9 that are left for two, then 6.
    assert even_parts(np.array([5, 1, 1, 1, 5, 1]), budget=6, parts=3) == [0, 1, 4, 6]
    # An even division would be 8 and 10, but 10 are too many.
    assert even_parts(np.array([4, 4, 1, 9]), budget=9, parts=2) == [0, 3, 4]
    tokens = np.random.default_rng(0).integers(1, 50, size=2000)
    bounds = even_parts(tokens, budget=2000, parts=40)
    sums = [tokens[start:end].sum() for start, end in pairwise(bounds)]
    assert max(sums) - min(sums) < 50  # one example


def test_what_does_not_fit_is_left_out_at_the_end() -> None:
    assert even_parts(np.array([6, 6, 6, 6, 6]), budget=6, parts=4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", LAYOUTS)
def test_any_sizes_in_any_layout(count: int) -> None:
    generator = np.random.default_rng(count)
    for trial in range(40):
        tokens = generator.integers(1, generator.integers(2, 60), size=generator.integers(count, 80))
        budget = int(tokens.max() * generator.uniform(1, 5))
        cuts = [ByTokens(tokens, budget, layout, seed=trial) for layout in LAYOUTS[count]]
        lengths = set()
        for epoch in range(3):
            epochs = [cut(epoch) for cut in cuts]
            for windows, layout in zip(epochs, LAYOUTS[count], strict=True):
                parts = [part for window in windows for part in window]
                taken = [example for part in parts for example in part]
                assert all(0 < tokens[part].sum() <= budget for part in parts)
                assert len(taken) == len(set(taken)) > len(tokens) - layout.world_size
                assert all(len(window) == count for window in windows[:-1])
                assert len(windows[-1]) % layout.world_size == 0
                lengths.add((layout.world_size, len(parts)))
                if len(taken) < len(tokens) or len(parts) % count:
                    # Only where almost no micro-batch has a second example to give.
                    assert len(parts) > len(tokens) - count
                else:
                    assert windows == epochs[0]
        assert len(lengths) == len(LAYOUTS[count])  # the same in every epoch


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 23), (2, 22), (4, 20)])
def test_examples_that_each_fill_the_budget(world: int, micro_batches: int) -> None:
    """No second example to give: the last step is smaller, and the examples that cannot be divided are dropped."""
    windows = ByTokens([9] * 23, 10, Division(4 // world, world), seed=0)(0)
    assert [len(window) for window in windows] == [4] * 5 + [micro_batches - 20] * (micro_batches > 20)
    assert all(len(part) == 1 for window in windows for part in window)


def test_epochs_differ_and_repeat() -> None:
    tokens = np.arange(1, 41)
    first, again = (ByTokens(tokens, 100, Division(2), seed=1) for _ in range(2))
    assert first(0) == again(0)
    assert first(0) != first(1)
    assert first(0) != ByTokens(tokens, 100, Division(2), seed=2)(0)
    # The micro-batches differ too, not only their order.
    micro_batches = [{frozenset(part) for window in first(epoch) for part in window} for epoch in (0, 1)]
    assert len(micro_batches[0] & micro_batches[1]) <= 1


def test_totals_are_those_of_the_whole_step_whatever_its_counts() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 60, size=50)
    groups, ones = np.arange(50) % 2, np.ones(50)
    sizes = Sizes(tokens, groups, ordinary_groups=groups // 2, chosen=ones, rejected=np.arange(50) % 3)
    for layout in LAYOUTS[4]:
        windows = ByTokens(tokens, 120, layout, seed=0)(0)
        ranks = [Division(layout.accumulate, layout.world_size, rank) for rank in range(layout.world_size)]
        plans = [plan_epoch(windows, sizes, rank) for rank in ranks]
        assert len({len(plan) for plan in plans}) == 1
        for step in range(len(windows)):
            start = step * layout.accumulate
            micro_batches = [micro for plan in plans for micro in plan[start : start + layout.accumulate]]
            taken = [index for micro in micro_batches for index in micro.indices]
            assert len({len(micro.indices) for micro in micro_batches}) > 1  # otherwise this would not show anything
            for micro in micro_batches:
                assert micro.normalizers.examples * 4 == len(taken)
                assert micro.normalizers.response_tokens * 4 == tokens[taken].sum()
                assert micro.normalizers.groups * 4 == sum(index % 2 for index in taken)


def test_an_example_above_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="an example has 9 tokens, more than the budget of 8"):
        ByTokens([3, 9], 8, Division(), seed=0)
