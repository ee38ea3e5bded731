"""Cosines between languages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric, widen


def pair_cosines(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between the rows of each prompt, and which rows they can be told of.

    A row that is missing or all zeros has no direction and is not usable; its cosines are 0. A row that is
    not finite is usable, and its cosines are NaN: what has gone wrong must be seen.

    Args:
        states: (B, L, D) floating point.
        mask: (B, L) bool, False where a row is missing; what stands there is not looked at.

    Returns:
        (B, L, L) cosines from -1 to 1 in float64 (float32 on a device without), and (B, L) bool usable rows.
    """
    # `where`, not a product: a missing row may hold NaN.
    rows = widen(torch.where(mask[:, :, None], states, 0.0))
    largest = rows.abs().amax(2, keepdim=True)
    usable = largest != 0  # also true for NaN
    rows = rows / torch.where(usable, largest, 1.0)  # so that no square over- or underflows
    unit = rows / torch.where(usable, rows.norm(dim=2, keepdim=True), 1.0)
    return (unit @ unit.transpose(1, 2)).clamp(-1, 1), usable[:, :, 0]


class LanguageCosines(KeyedMetric):
    """Mean cosine between the states of a prompt in each two languages.

    ``compute`` gives (L, L): the mean over the examples that have both languages, NaN where none has.

    Args:
        languages: BCP-47 codes of the L languages.
    """

    def __init__(self, languages: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.languages = tuple(languages)
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # No samples, but with their shape: a process that never gets any must still send the others
        # tensors like theirs.
        none = torch.zeros(0, len(self.languages), 1, device=self.device)
        self.update(none[:, 0, 0].long(), none, none[:, :, 0].bool())

    def update(self, keys: Tensor, states: Tensor, mask: Tensor) -> None:
        """Add B examples: their ``keys`` (B,), ``states`` (B, L, D) and which are there, ``mask`` (B, L)."""
        cosines, usable = pair_cosines(states, mask)
        together = usable[:, :, None] & usable[:, None, :]
        self._add(keys, torch.stack([cosines, together.to(cosines.dtype)], dim=1))

    def compute(self) -> Tensor:
        """(L, L) mean cosines."""
        keys, values = self._unique()
        size = len(self.languages)
        totals: Tensor = values.reshape(len(keys), 2, size, size).sum(0)  # no samples have no shape of their own
        return totals[0] / totals[1]  # 0 / 0 is NaN: no example has both languages

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """A heatmap of ``val`` (L, L; what ``compute`` gives if None) on ``ax``, or on a new figure.

        Returns:
            The figure and the axes.
        """
        from lightning_mlc.report.plots import draw_cosines, figure_and_axes

        figure, axes = figure_and_axes(ax, width=5.0, height=4.6)
        draw_cosines(axes, (self.compute() if val is None else val).tolist(), self.languages)
        return figure, axes
