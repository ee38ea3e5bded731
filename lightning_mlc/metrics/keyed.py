"""Samples that know which example they are of.

Processes that share out a dataset unevenly see some examples twice. A metric over keyed samples keeps each
(example, language) once, and so does not depend on batches, their order, or the number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def widen(values: Tensor) -> Tensor:
    """``values`` in float64, or in float32 on the one device type that has no float64."""
    return values.float() if values.device.type == "mps" else values.double()


class KeyedMetric(Metric):
    """Collects rows of values under integer keys."""

    full_state_update = False

    keys: list[Tensor]
    values: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def _add(self, keys: Tensor, values: Tensor) -> None:
        # float64: a mean over many examples must not depend on their order.
        self.keys.append(keys.detach())
        self.values.append(widen(values.detach()))

    def _unique(self) -> tuple[Tensor, Tensor]:
        """Sorted keys (N,) and the values (N, ...) of their first samples."""
        if len(self.keys) == 0:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        keys, values = dim_zero_cat(self.keys), dim_zero_cat(self.values)
        unique, inverse = torch.unique(keys, return_inverse=True)
        positions = torch.arange(len(keys), device=keys.device)
        first = positions.new_full((len(unique),), len(keys)).scatter_reduce(0, inverse, positions, "amin")
        return unique, values[first]
