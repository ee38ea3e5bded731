"""Metrics that count each example once.

Processes that split a data set unevenly see some examples twice. Here each sample carries a key of its example (and
language), and only the first sample of a key counts. So the result does not depend on the batches, on their order, or
on the number of processes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_mlc.consistency.measures import widen


class KeyedMetric(Metric):
    """Base of metrics that collect values under integer keys.

    Args:
        **options: Options of ``torchmetrics.Metric``.
    """

    full_state_update = False

    keys: list[Tensor]
    values: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._add_none()

    @abstractmethod
    def _add_none(self) -> None:
        """Add an empty sample with the right shape: a process without samples must still send tensors of this shape."""

    def _add(self, keys: Tensor, values: Tensor) -> None:
        # In float64, so that a mean over many examples does not depend on their order.
        self.keys.append(keys.detach())
        self.values.append(widen(values.detach()))

    def _unique(self) -> tuple[Tensor, Tensor]:
        """Return the sorted keys (N,) and the values (N, ...) of the first sample of each key."""
        if len(self.keys) == 0:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        keys, values = dim_zero_cat(self.keys), dim_zero_cat(self.values)
        unique, inverse = torch.unique(keys, return_inverse=True)
        positions = torch.arange(len(keys), device=keys.device)
        first = positions.new_full((len(unique),), len(keys)).scatter_reduce(0, inverse, positions, "amin")
        return unique, values[first]
