"""How an epoch's shuffled examples are cut into windows, one per optimizer step, and these into micro-batches.

A micro-batch takes a fixed number of examples, or as many as make up a budget of tokens. Both ways, the
windows depend neither on the process that asks nor, as long as a window has equally many examples or
micro-batches, on how accumulation and processes share it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Window = list[list[int]]
"""The micro-batches of an optimizer step, in turn over the processes: indices of examples."""

Cut = Callable[[int], list[Window]]
"""Gives the windows of an epoch."""

DRAWS = 8
"""Shuffled orders that are tried out for the number of micro-batches of an epoch. A new order needs no more than
the greediest of so many in eight of nine cases."""


@dataclass(frozen=True)
class Division:
    """Among whom the micro-batches of an optimizer step are divided."""

    accumulate: int = 1
    """Micro-batches one after the other."""
    world_size: int = 1
    """Processes side by side; those that run the same examples count as one."""
    rank: int = 0
    """Which of them this is."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a whole window, of all processes."""
        return self.accumulate * self.world_size


class ByExamples:
    """Micro-batches of ``batch_size`` examples.

    Of an epoch's last, incomplete window at most ``world_size - 1`` examples are dropped, since every process
    needs one for each of its micro-batches.
    """

    def __init__(self, count: int, batch_size: int, division: Division, seed: int) -> None:
        self._count = count
        self._batch_size = batch_size
        self._division = division
        self._seed = seed

    def __call__(self, epoch: int) -> list[Window]:
        order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
        world_size = self._division.world_size
        window = self._batch_size * self._division.micro_batches
        windows: list[Window] = []
        for start in range(0, len(order), window):
            examples = order[start : start + window]
            micro = -(-len(examples) // (self._batch_size * world_size))
            if len(examples) < micro * world_size:
                examples = examples[: len(examples) // world_size * world_size]
                micro = -(-len(examples) // (self._batch_size * world_size))
            if len(examples):
                windows.append([part.tolist() for part in np.array_split(examples, micro * world_size)])
        return windows


class ByTokens:
    """Micro-batches of consecutive examples with at most ``budget`` tokens.

    Every epoch has a shuffled order of its own and yet the same number of micro-batches, for schedules, progress
    bars and limits count on it. The number is what the shuffled orders of a first try need, rounded up to whole
    windows, so that no step is smaller than the others; an order that needs more is drawn again. The room that is
    left is shared out evenly: micro-batches side by side take about equally long.

    Examples are dropped only where nearly each is a micro-batch of its own: at most ``world_size - 1``.

    Raises:
        ValueError: An example has more than ``budget`` tokens.
    """

    def __init__(self, tokens: Sequence[int] | np.ndarray, budget: int, division: Division, seed: int) -> None:
        self._tokens = np.asarray(tokens)
        self._budget = budget
        self._micro_batches = division.micro_batches
        self._seed = seed
        count = len(self._tokens)
        if count and self._tokens.max() > budget:
            raise ValueError(f"an example has {self._tokens.max()} tokens, more than the budget of {budget}")
        generator = np.random.default_rng([seed, 0])
        needed = max(fewest_parts(self._tokens[generator.permutation(count)], budget) for _ in range(DRAWS))
        whole = -(-needed // division.micro_batches) * division.micro_batches
        self._parts = min(whole, count // division.world_size * division.world_size)
        self._most = max(needed, self._parts)

    def __call__(self, epoch: int) -> list[Window]:
        generator = np.random.default_rng([self._seed, epoch])
        while True:
            order = generator.permutation(len(self._tokens))
            if fewest_parts(self._tokens[order], self._budget) <= self._most:
                break
        bounds = even_parts(self._tokens[order], self._budget, self._parts)
        parts = [order[start:end].tolist() for start, end in pairwise(bounds)]
        return [parts[start : start + self._micro_batches] for start in range(0, len(parts), self._micro_batches)]


def fewest_parts(tokens: np.ndarray, budget: int) -> int:
    """Into how few consecutive parts of at most ``budget`` tokens the examples can be cut.

    To take examples for as long as they fit is optimal where their order is given.
    """
    reach = _reach(tokens, budget)
    parts = position = 0
    while position < len(tokens):
        position = reach[position]
        parts += 1
    return parts


def even_parts(tokens: np.ndarray, budget: int, parts: int) -> list[int]:
    """Bounds of ``parts`` consecutive parts, none empty, of at most ``budget`` tokens and as even as that allows.

    Returns:
        ``parts + 1`` positions, from 0. Where the examples do not fit into so many parts, those at the end are
        left out, and the last position is short of their number.
    """
    reach = _reach(tokens, budget)
    end = 0
    for _ in range(parts):
        if end < len(tokens):
            end = reach[end]
    # How few parts are needed for what begins at each position.
    fewest = [0] * (end + 1)
    for position in reversed(range(end)):
        fewest[position] = 1 + fewest[min(reach[position], end)]
    sums = np.concatenate([[0], np.cumsum(tokens[:end])])
    bounds = [0]
    for left in reversed(range(parts)):  # parts after this one
        begin = bounds[-1]
        goal = sums[begin] + (sums[end] - sums[begin]) / (left + 1)
        after = int(np.searchsorted(sums, goal))
        position = after if goal - sums[after - 1] > sums[after] - goal else after - 1
        # At least one example is taken, and one left for each of the other parts, ...
        position = min(max(position, begin + 1), reach[begin], end - left)
        # ... which must be able to hold the rest.
        while fewest[position] > left:
            position += 1
        bounds.append(position)
    return bounds


def _reach(tokens: np.ndarray, budget: int) -> list[int]:
    """For each position, where the part that begins there ends at the latest."""
    sums = np.cumsum(tokens)
    reach: list[int] = np.searchsorted(sums, sums - tokens + budget, side="right").tolist()
    return reach
