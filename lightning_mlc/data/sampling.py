"""Plan the micro-batches of an epoch before it starts.

An epoch consists of windows, one per optimizer step (:mod:`lightning_mlc.data.windows`). The micro-batches of a window
are divided among the processes. Windows do not depend on this division, so 1 x 4, 2 x 2 and 4 x 1 (processes x
accumulation) train on the same examples in the same steps. Each micro-batch carries the totals of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from lightning_mlc.data.batches import Normalizers
from lightning_mlc.data.windows import Cut, Division, Window


@dataclass(frozen=True)
class Sizes:
    """For each of N examples, what it adds to the totals of its step (see `Normalizers`)."""

    response_tokens: np.ndarray
    """(N,): number of tokens of the chosen response."""
    groups: np.ndarray
    """(N,): 1 if the prompt exists in two or more languages, else 0."""
    ordinary_groups: np.ndarray
    """(N,): 1 if such a prompt is an ordinary one, else 0."""
    chosen: np.ndarray
    """(N,): 1 if the example has a chosen response, else 0."""
    rejected: np.ndarray
    """(N,): 1 if the example has a rejected response, else 0."""

    def totals(self, taken: list[int], share: int = 1) -> Normalizers:
        """Add up some examples.

        Args:
            taken: Indices of the examples.
            share: Number that the totals are divided by.
        """
        return Normalizers(
            examples=len(taken) / share,
            response_tokens=float(self.response_tokens[taken].sum()) / share,
            groups=float(self.groups[taken].sum()) / share,
            ordinary_groups=float(self.ordinary_groups[taken].sum()) / share,
            chosen=float(self.chosen[taken].sum()) / share,
            rejected=float(self.rejected[taken].sum()) / share,
        )


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of one process."""

    indices: tuple[int, ...]
    """Indices of its examples."""
    normalizers: Normalizers
    """The numbers that its sums are divided by."""


def plan_epoch(
    windows: Sequence[Window], sizes: Sizes, division: Division, limit: int | float | None = None
) -> list[MicroBatch]:
    """Plan the micro-batches of one process in an epoch. Every process gets the same number.

    Args:
        windows: The windows of the epoch.
        sizes: What each example adds to the totals of its step.
        division: The processes, and which of them this is.
        limit: ``Trainer.limit_train_batches``: a number of micro-batches, or a share. None: no limit.
    """
    world_size, rank = division.world_size, division.rank
    total = length_of(windows, division)
    left = total if limit is None else limit if isinstance(limit, int) else int(limit * total)

    plan: list[MicroBatch] = []
    for parts in windows:
        micro = min(len(parts) // world_size, left)
        left -= micro
        taken = [index for part in parts[: micro * world_size] for index in part]
        # Lightning divides by `accumulate` even in an incomplete window, and DDP by the number of processes.
        normalizers = sizes.totals(taken, share=division.micro_batches)
        plan += [MicroBatch(tuple(parts[step * world_size + rank]), normalizers) for step in range(micro)]
    return plan


def length_of(windows: Sequence[Window], division: Division) -> int:
    """Return the number of micro-batches of each process in an epoch.

    Args:
        windows: The windows of the epoch.
        division: The processes.
    """
    return sum(len(parts) // division.world_size for parts in windows)


def spread(indices: Sequence[int] | np.ndarray, most: int) -> list[int]:
    """Take at most ``most`` of ``indices``, at equal distances, because files are often sorted."""
    if not len(indices):
        return []
    places = np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(int)
    return [int(indices[place]) for place in places]


class TrainingBatches(Sampler[MicroBatch]):
    """Sampler of training batches, which resumes in the middle of an epoch.

    Args:
        sizes: What each example adds to the totals of its step.
        cut: Returns the windows of an epoch. All epochs have the same number of micro-batches.
        division: The processes, and which of them this is.
        limit: ``Trainer.limit_train_batches``: a number of micro-batches, or a share. None: no limit.
        progress: Returns the current epoch, and how many of its micro-batches have been trained. A resumed run
            continues with the next one. It is called whenever an iteration starts, because Lightning's ``set_epoch``
            counts one epoch too many after a run resumes at the end of an epoch.
    """

    def __init__(
        self,
        sizes: Sizes,
        cut: Cut,
        division: Division = Division(),  # noqa: B008 (frozen)
        limit: int | float | None = None,
        progress: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._sizes = sizes
        self._cut = cut
        self._division = division
        self._limit = limit
        self._progress = progress
        self._length = length_of(cut(0), division)

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch, done = self._progress()
        return iter(plan_epoch(self._cut(epoch), self._sizes, self._division, self._limit)[done:])

    def __len__(self) -> int:
        """Number of micro-batches of an epoch without the limit, because Lightning applies the limit itself."""
        return self._length


class EvaluationBatches(Sampler[MicroBatch]):
    """Sampler of evaluation batches, in the order of the table. Processes take batches in turn.

    If the batches cannot be divided evenly, the last ones repeat examples, so that no process waits for another.
    Metrics count each example once.

    Args:
        sizes: Sizes of all examples.
        batch_size: Number of examples in a batch.
        world_size: Number of processes.
        rank: Number of this process, from 0.
        examples: Indices of the examples to take. None: all.
    """

    def __init__(
        self,
        sizes: Sizes,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        examples: Sequence[int] | None = None,
    ) -> None:
        taken = range(len(sizes.groups)) if examples is None else examples
        starts = list(range(0, len(taken), batch_size))
        starts += [starts[i % len(starts)] for i in range(-len(starts) % world_size)]
        self._batches = []
        for start in starts[rank::world_size]:
            indices = tuple(taken[start : start + batch_size])
            self._batches.append(MicroBatch(indices, sizes.totals(list(indices))))

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
