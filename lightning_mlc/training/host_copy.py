"""Bring values from the device to the host without waiting for the work that comes after them."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in the memory of the host, which begins at once.

    On a GPU the copy takes its place among the operations that wait to be run. :meth:`get` waits for it and for what
    was asked for before it, but not for what was asked for afterwards.

    Args:
        values: Any tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = values.to("cpu", non_blocking=True)  # into page-locked memory
            self._copied = torch.cuda.current_stream(values.device).record_event()

    def get(self) -> Tensor:
        """The values, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.cpu()
