"""Which examples make up which micro-batch, known before an epoch starts.

A plan cuts the shuffled examples into windows, one per optimizer step, and windows into the micro-batches
of each process. The windows depend only on how many examples a step takes; so 1 x 4, 2 x 2 and 4 x 1
(examples per micro-batch x accumulation), on one process or several, train on the same examples in the same
steps, and each micro-batch knows the totals of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from lightning_mlc.data.batches import Normalizers


@dataclass(frozen=True)
class Sizes:
    """What an example adds to the totals of its step, for each example of a table."""

    response_tokens: np.ndarray
    groups: np.ndarray
    """1 where there are prompts in two or more languages, else 0."""


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one process's micro-batch, and what its sums are divided by."""

    indices: tuple[int, ...]
    normalizers: Normalizers


def plan_epoch(
    order: Sequence[int],
    sizes: Sizes,
    batch_size: int,
    accumulate: int,
    world_size: int,
    rank: int,
    limit: int | float | None = None,
) -> list[MicroBatch]:
    """The micro-batches of process ``rank`` in an epoch over ``order``.

    Every process gets equally many, none of them empty: of an epoch's last, incomplete window at most
    ``world_size - 1`` examples are dropped. ``limit`` cuts the epoch as ``Trainer.limit_train_batches`` does.
    """
    window = batch_size * accumulate * world_size
    windows: list[list[list[int]]] = []  # window, part (micro-batch x process), example
    for start in range(0, len(order), window):
        examples = list(order[start : start + window])
        micro = -(-len(examples) // (batch_size * world_size))
        if len(examples) < micro * world_size:
            examples = examples[: len(examples) // world_size * world_size]
            micro = -(-len(examples) // (batch_size * world_size))
        if examples:
            windows.append([part.tolist() for part in np.array_split(np.array(examples), micro * world_size)])
    total = sum(len(parts) // world_size for parts in windows)
    left = total if limit is None else limit if isinstance(limit, int) else int(limit * total)

    plan: list[MicroBatch] = []
    for parts in windows:
        micro = min(len(parts) // world_size, left)
        left -= micro
        taken = [index for part in parts[: micro * world_size] for index in part]
        # Lightning divides by `accumulate` even in an incomplete window, and DDP by the processes.
        share = accumulate * world_size
        normalizers = Normalizers(
            examples=len(taken) / share,
            response_tokens=float(sizes.response_tokens[taken].sum()) / share,
            groups=float(sizes.groups[taken].sum()) / share,
        )
        plan += [MicroBatch(tuple(parts[step * world_size + rank]), normalizers) for step in range(micro)]
    return plan


class TrainingBatches(Sampler[MicroBatch]):
    """Sampler over the plan of each epoch, from where ``progress`` says that training stands.

    Args:
        sizes: What each example adds to a step's totals.
        batch_size: Examples per micro-batch.
        accumulate: Micro-batches per optimizer step.
        world_size: Number of processes.
        rank: Which of them this is.
        limit: ``Trainer.limit_train_batches``.
        seed: Seed of the order, which follows from it and the epoch alone.
        progress: Gives the current epoch, and how many of its micro-batches are already trained on: a resumed
            run goes on with the next. Asked whenever an iteration starts, for Lightning's ``set_epoch`` counts
            one epoch too many after a resumption at an epoch's end.
    """

    def __init__(
        self,
        sizes: Sizes,
        batch_size: int,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        limit: int | float | None = None,
        seed: int = 0,
        progress: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._sizes = sizes
        self._cut = (batch_size, accumulate, world_size, rank, limit)
        self._seed = seed
        self._progress = progress
        self._length = len(self._plan(epoch=0))

    def _plan(self, epoch: int) -> list[MicroBatch]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes.groups))
        return plan_epoch(order.tolist(), self._sizes, *self._cut)

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch, done = self._progress()
        return iter(self._plan(epoch)[done:])

    def __len__(self) -> int:
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
            taken = list(indices)
            self._batches.append(
                MicroBatch(
                    indices,
                    Normalizers(
                        examples=len(taken),
                        response_tokens=float(sizes.response_tokens[taken].sum()),
                        groups=float(sizes.groups[taken].sum()),
                    ),
                )
            )

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
