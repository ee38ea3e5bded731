"""Cut the shuffled examples of an epoch into windows, one per optimizer step, and windows into micro-batches.

A micro-batch has a fixed number of examples, or as many examples as fit into a budget of tokens. Every process computes
the same windows. They do not depend on the division into accumulation and processes either, as long as a window keeps
its number of examples or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Window = list[list[int]]
"""The micro-batches of an optimizer step, as indices of examples. The processes take them in turn."""

Cut = Callable[[int], list[Window]]
"""Takes the number of an epoch, and returns its windows."""

DRAWS = 8
"""Number of shuffled orders that are tried to choose the number of micro-batches of an epoch. In eight of nine cases a
new order needs no more micro-batches than the worst of eight orders."""


@dataclass(frozen=True)
class Division:
    """How the micro-batches of an optimizer step are divided."""

    accumulate: int = 1
    """Number of micro-batches that a process runs one after the other."""
    world_size: int = 1
    """Number of processes. Those that run the same examples count as one."""
    rank: int = 0
    """Number of this process, from 0."""

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a complete window, of all processes."""
        return self.accumulate * self.world_size


class ByExamples:
    """Cuts epochs into micro-batches with a fixed number of examples.

    From the last, incomplete window of an epoch at most ``world_size - 1`` examples are dropped, because every process
    needs at least one example for each of its micro-batches.

    Args:
        count: Number of examples.
        batch_size: Number of examples in a micro-batch.
        division: How a window is divided.
        seed: Seed of the shuffled orders.
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
    """Cuts epochs into micro-batches with at most a given number of tokens.

    Every epoch has another order, but the same number of micro-batches, because schedules, progress bars and limits
    need a fixed number. It is the largest number that ``DRAWS`` shuffled orders need, rounded up to complete windows,
    so that no step is smaller than the others. An order that needs more is replaced by a new one. Tokens are spread
    evenly, so that micro-batches of different processes take about the same time.

    Examples are dropped only if nearly every example is a micro-batch of its own: at most ``world_size - 1``.

    Args:
        tokens: (N,): number of tokens of each example.
        budget: Largest number of tokens in a micro-batch.
        division: How a window is divided.
        seed: Seed of the shuffled orders.

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
    """Return the smallest number of consecutive parts with at most ``budget`` tokens each.

    Each part takes examples as long as they fit, which is optimal for a given order.

    Args:
        tokens: (N,): number of tokens of each example, in order.
        budget: Largest number of tokens in a part.
    """
    reach = _reach(tokens, budget)
    parts = position = 0
    while position < len(tokens):
        position = reach[position]
        parts += 1
    return parts


def even_parts(tokens: np.ndarray, budget: int, parts: int) -> list[int]:
    """Cut examples into consecutive parts of similar size. No part is empty.

    Args:
        tokens: (N,): number of tokens of each example, in order.
        budget: Largest number of tokens in a part.
        parts: Number of parts.

    Returns:
        ``parts + 1`` positions that separate the parts, from 0. If the examples do not fit into that many parts, those
        at the end are left out, and the last position is less than N.
    """
    reach = _reach(tokens, budget)
    end = 0
    for _ in range(parts):
        if end < len(tokens):
            end = reach[end]
    # The smallest number of parts for the examples from each position on.
    fewest = [0] * (end + 1)
    for position in reversed(range(end)):
        fewest[position] = 1 + fewest[min(reach[position], end)]
    sums = np.concatenate([[0], np.cumsum(tokens[:end])])
    bounds = [0]
    for left in reversed(range(parts)):  # number of parts after this one
        begin = bounds[-1]
        goal = sums[begin] + (sums[end] - sums[begin]) / (left + 1)
        after = int(np.searchsorted(sums, goal))
        position = after if goal - sums[after - 1] > sums[after] - goal else after - 1
        # Take at least one example, and leave at least one for each later part.
        position = min(max(position, begin + 1), reach[begin], end - left)
        # Take more if the later parts could not hold the rest.
        while fewest[position] > left:
            position += 1
        bounds.append(position)
    return bounds


def _reach(tokens: np.ndarray, budget: int) -> list[int]:
    """For each position, the last possible end of a part that begins there."""
    sums = np.cumsum(tokens)
    reach: list[int] = np.searchsorted(sums, sums - tokens + budget, side="right").tolist()
    return reach
