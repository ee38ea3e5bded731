"""A mean over examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric


class ExampleMean(KeyedMetric):
    """Mean of a value over examples. ``compute`` gives it as a scalar; NaN without samples."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # No samples, but with their shape: a process that never gets any must still send the others
        # tensors like theirs.
        none = torch.zeros(0, device=self.device)
        self.update(none.long(), none)

    def update(self, keys: Tensor, values: Tensor) -> None:
        """Add N samples: example ``keys`` (N,) and ``values`` (N,)."""
        self._add(keys, values)

    def compute(self) -> Tensor:
        """() the mean."""
        return self._unique()[1].mean()
