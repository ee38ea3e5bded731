"""Means of what is logged, since the last log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from lightning_mlc.consistency.collapse import prompt_cosines


class LoggedMeans:
    """Adds up values of prompts, and cosines between prompts. Only taking the means waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int | Tensor] = {}
        self._prompt_sums: dict[str, Tensor] = {}
        """Sums over the prompts of the step so far."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add (B,) values by name."""
        for name, value in values.items():
            self._add(name, value.sum(), len(value))

    def add_prompts(self, sums: Mapping[str, Tensor]) -> None:
        """Add :func:`~lightning_mlc.consistency.collapse.prompt_sums` of a micro-batch, by the names of their means."""
        for name, value in sums.items():
            self._prompt_sums[name] = self._prompt_sums.get(name, 0.0) + value

    def end_step(self) -> None:
        """Compare the prompts that this process had in the step with each other."""
        for name, sums in self._prompt_sums.items():
            self._add(name, *prompt_cosines(sums))
        self._prompt_sums = {}

    def take(self, synchronize: bool) -> dict[str, float]:
        """Return the means by name, and forget them.

        Args:
            synchronize: Average over all processes, each of which has to call this.
        """
        pairs = [count for count in self._counts.values() if isinstance(count, Tensor)]
        # Waits for the device once.
        read = iter(torch.stack([*self._sums.values(), *pairs]).tolist() if self._sums else [])
        sums = [next(read) for _ in self._sums]
        counts = [next(read) if isinstance(count, Tensor) else float(count) for count in self._counts.values()]
        own = {name: (value, count) for name, value, count in zip(self._sums, sums, counts, strict=True)}
        self._sums, self._counts = {}, {}
        processes = [own]
        if synchronize and distributed.is_available() and distributed.is_initialized():
            processes = [{}] * distributed.get_world_size()
            distributed.all_gather_object(processes, own)
        totals: dict[str, tuple[float, float]] = {}
        for of_one in processes:
            for name, (value, count) in of_one.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + value, before[1] + count
        return {name: value / count for name, (value, count) in sorted(totals.items()) if count}

    def _add(self, name: str, value: Tensor, count: int | Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + count
