"""Ends a run whose loss is not finite, before the weights are changed by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mlc.errors import UserError, some_of
from lightning_mlc.processes import raise_together

MOST = 1000
"""The most characters of ids in the error."""


class LossWatch:
    """Remembers the losses of an optimizer step, and the rows that each was computed from.

    The losses stay on the device. Only the mean of the step over all processes is looked at. A NaN or an infinity in
    one loss is one in the mean, too, so all processes find it at the same step and end together.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._ids: list[tuple[str, ...]] = []

    def add(self, loss: Tensor, ids: tuple[str, ...]) -> None:
        """Remember the () ``loss`` of a micro-batch, without waiting for it, and the ``ids`` of its rows."""
        self._losses.append(loss.detach())
        self._ids.append(ids)

    def require_finite(self, mean: float, step: int) -> None:
        """End the run if the step's loss is not finite; otherwise forget its micro-batches.

        Args:
            mean: The loss of the step, the same on all processes. All of them call this.
            step: The number of the optimizer step, from 0.

        Raises:
            UserError: It is not. The error has the rows of the first micro-batch that is not finite.
        """
        losses, ids = self._losses, self._ids
        self._losses, self._ids = [], []
        if math.isfinite(mean):
            return
        values = torch.stack(losses).tolist()
        broken = [pair for pair in zip(values, ids, strict=True) if not math.isfinite(pair[0])]
        raise_together(_error(*broken[0], step) if broken else None)
        # Only their sum overflows.
        raise _error(mean, tuple(id for rows in ids for id in rows), step)


def _error(loss: float, ids: tuple[str, ...], step: int) -> UserError:
    return UserError(
        None,
        f"the loss is {loss} at step {step} (batch of {some_of(ids, MOST)}); "
        "lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at those rows",
    )
