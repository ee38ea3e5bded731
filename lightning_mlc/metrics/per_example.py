"""A mean over examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric


class ExampleMean(KeyedMetric):
    """Mean of a value over examples. ``compute`` returns it, NaN without samples.

    Args:
        **options: Options of ``torchmetrics.Metric``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reset()

    def _add_none(self) -> None:
        none = torch.zeros(0, device=self.device)
        self.update(none.long(), none)

    def update(self, keys: Tensor, values: Tensor) -> None:
        """Add N samples.

        Args:
            keys: (N,) int64 keys of the examples.
            values: (N,) values.
        """
        self._add(keys, values)

    def compute(self) -> Tensor:
        """Return the mean, ()."""
        return self._unique()[1].mean()
