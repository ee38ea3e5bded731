"""Metrics of an optimizer step, summed over its micro-batches."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mlc.consistency.collapse import (
    BETWEEN_PROMPTS,
    RAW_BETWEEN_PROMPTS,
    CollapseWatch,
    mean_prompt_cosine,
)
from lightning_mlc.processes import DataParallel, mean_of_all
from lightning_mlc.training.host_copy import HostCopy

COSINES = (BETWEEN_PROMPTS, RAW_BETWEEN_PROMPTS)
"""Names of mean cosines, which are computed from sums over the prompts of a step."""
REMEDY = (
    "turn on model.consistency.retain or model.consistency.contrast, lower model.consistency.mlc.weight, or train an "
    "objective on ordinary rows, too (docs/consistency.md)"
)
"""What to do if all prompts fall onto one line."""


class StepMetrics:
    """Sums what the micro-batches of an optimizer step measured.

    Each value is a share of the step's mean, divided as the gradient is (see
    :class:`~lightning_mlc.data.batches.Normalizers`), so the mean is a sum.

    Args:
        repeated: Prefixes of the metrics that some steps do not have. Such steps repeat the latest values; otherwise
            ``every_n_steps`` could hide them from every log.
    """

    KEY: ClassVar[str] = "repeated_metrics"
    """Where a checkpoint has :meth:`latest`."""

    def __init__(self, repeated: tuple[str, ...]) -> None:
        self._watch = CollapseWatch(REMEDY)
        self._repeated = repeated
        self._sums: dict[str, Tensor] = {}
        self._closed: tuple[list[str], HostCopy] | None = None
        """Names and values of a step that has not been read."""
        self._latest: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of a micro-batch: () shares, and (L, D + 1) sums over prompts."""
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def close(self, trainer: Trainer) -> None:
        """Take the means of the step over its micro-batches and all processes. The next step begins from nothing.

        The host does not wait for them. They are copied to it as soon as the device has computed them.
        """
        self._take_cosines(trainer)
        values = torch.stack(list(self._sums.values())) / trainer.accumulate_grad_batches
        # Each share of the examples has the same number of processes (see `DataParallel`).
        self._closed = list(self._sums), HostCopy(mean_of_all(values))
        self._sums = {}

    def read(self) -> dict[str, Tensor] | None:
        """Wait for the means of the step that was closed, and return them as () tensors on the host.

        None if no step was closed since the last call.
        """
        if self._closed is None:
            return None
        names, values = self._closed
        self._closed = None
        means = dict(zip(names, values.get(), strict=True))
        means = {name: value for name, value in means.items() if name not in COSINES or not value.isnan()}
        self._watch.look({name: float(means[name]) for name in CollapseWatch.LOOKS_AT if name in means})
        self._latest |= {name: value for name, value in means.items() if name.startswith(self._repeated)}
        return means | self._latest

    def latest(self) -> dict[str, float]:
        """The values that the next step repeats if it does not have them, for a checkpoint."""
        return {name: float(value) for name, value in self._latest.items()}

    def restore(self, latest: dict[str, float]) -> None:
        """Go on from the values of :meth:`latest`, so that a resumed run logs what an uninterrupted one would."""
        self._latest = {name: torch.tensor(value) for name, value in latest.items()}

    def _take_cosines(self, trainer: Trainer) -> None:
        """Replace sums over prompts by mean cosines; NaN if the step has no two prompts."""
        for name in COSINES:
            if (sums := self._sums.get(name)) is None:
                continue
            # The prompts of all processes. Those that split a layer have the same ones.
            sums = mean_of_all(sums) * DataParallel.of(trainer).size
            # The division by the number of micro-batches, to come, must leave this mean as it is.
            self._sums[name] = mean_prompt_cosine(sums) * trainer.accumulate_grad_batches
