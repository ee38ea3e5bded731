"""Metrics of an optimizer step, summed over its micro-batches."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class StepMetrics:
    """Sums what the micro-batches of an optimizer step measured.

    Each value is a share of the step's mean, divided as the gradient is (see
    :class:`~lightning_mlc.data.batches.Normalizers`), so the mean is a sum.

    Args:
        repeated: Prefixes of the metrics that some steps do not have. Such steps repeat the latest values; otherwise
            ``every_n_steps`` could hide them from every log.
    """

    def __init__(self, repeated: tuple[str, ...]) -> None:
        self._repeated = repeated
        self._sums: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the () values of a micro-batch."""
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def finish(self, trainer: Trainer) -> dict[str, Tensor]:
        """The means of the step over its micro-batches and all processes. The next step begins from nothing."""
        values = torch.stack(list(self._sums.values())) / trainer.accumulate_grad_batches
        if trainer.world_size > 1:  # each share of the examples has the same number of processes (see `DataParallel`)
            values = trainer.strategy.reduce(values, reduce_op="mean")
        means = dict(zip(self._sums, values, strict=True))
        self._sums = {}
        self._latest |= {name: value for name, value in means.items() if name.startswith(self._repeated)}
        return means | self._latest
