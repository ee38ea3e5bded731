"""Which examples make up which micro-batch, known before an epoch starts.

The windows of an epoch, one per optimizer step (:mod:`lightning_mlc.data.windows`), are shared out to the
micro-batches of each process. They do not depend on that; so 1 x 4, 2 x 2 and 4 x 1 (processes x accumulation)
train on the same examples in the same steps, and each micro-batch knows the totals of its step.
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
    """What an example adds to the totals of its step, for each example of a table (see `Normalizers`)."""

    response_tokens: np.ndarray
    """Tokens of the chosen response."""
    groups: np.ndarray
    """1 where there are prompts in two or more languages, else 0."""
    chosen: np.ndarray
    """1 where there is a chosen response, else 0."""
    rejected: np.ndarray
    """1 where there is a rejected response, else 0."""

    def totals(self, taken: list[int], share: int = 1) -> Normalizers:
        """Of the examples ``taken``, divided by ``share``."""
        return Normalizers(
            examples=len(taken) / share,
            response_tokens=float(self.response_tokens[taken].sum()) / share,
            groups=float(self.groups[taken].sum()) / share,
            chosen=float(self.chosen[taken].sum()) / share,
            rejected=float(self.rejected[taken].sum()) / share,
        )


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one process's micro-batch, and what its sums are divided by."""

    indices: tuple[int, ...]
    normalizers: Normalizers


def plan_epoch(
    windows: Sequence[Window], sizes: Sizes, division: Division, limit: int | float | None = None
) -> list[MicroBatch]:
    """The micro-batches of process ``division.rank`` in an epoch of ``windows``.

    Every process gets equally many. ``limit`` cuts the epoch as ``Trainer.limit_train_batches`` does.
    """
    world_size, rank = division.world_size, division.rank
    total = length_of(windows, division)
    left = total if limit is None else limit if isinstance(limit, int) else int(limit * total)

    plan: list[MicroBatch] = []
    for parts in windows:
        micro = min(len(parts) // world_size, left)
        left -= micro
        taken = [index for part in parts[: micro * world_size] for index in part]
        # Lightning divides by `accumulate` even in an incomplete window, and DDP by the processes.
        normalizers = sizes.totals(taken, share=division.micro_batches)
        plan += [MicroBatch(tuple(parts[step * world_size + rank]), normalizers) for step in range(micro)]
    return plan


def length_of(windows: Sequence[Window], division: Division) -> int:
    """Micro-batches of each process in an epoch of ``windows``."""
    return sum(len(parts) // division.world_size for parts in windows)


class TrainingBatches(Sampler[MicroBatch]):
    """Sampler over the plan of each epoch, from where ``progress`` says that training stands.

    Args:
        sizes: What each example adds to a step's totals.
        cut: The windows of each epoch, equally many micro-batches in all of them.
        division: Among whom their micro-batches are divided.
        limit: ``Trainer.limit_train_batches``.
        progress: Gives the current epoch, and how many of its micro-batches are already trained on: a resumed
            run goes on with the next. Asked whenever an iteration starts, for Lightning's ``set_epoch`` counts
            one epoch too many after a resumption at an epoch's end.
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
        """Micro-batches of an epoch without the limit, which Lightning applies to this number itself."""
        return self._length


class EvaluationBatches(Sampler[MicroBatch]):
    """Batches in the order of the table, in turn over the processes.

    Where they do not share out evenly, the last ones repeat examples, so that no process waits for another;
    metrics count each example once.
    """

    def __init__(self, sizes: Sizes, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        count = len(sizes.groups)
        starts = list(range(0, count, batch_size))
        starts += [starts[i % len(starts)] for i in range(-len(starts) % world_size)]
        self._batches = []
        for start in starts[rank::world_size]:
            indices = tuple(range(start, min(start + batch_size, count)))
            self._batches.append(MicroBatch(indices, sizes.totals(list(indices))))

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
