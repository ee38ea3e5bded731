"""Cosines between languages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric, widen


class LanguageCosines(KeyedMetric):
    """Mean cosine between the states of a prompt in each two languages: (L, L), NaN where none has both.

    Args:
        languages: BCP-47 codes of the L languages.
    """

    def __init__(self, languages: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.languages = tuple(languages)

    def update(self, keys: Tensor, states: Tensor, mask: Tensor) -> None:
        """Add B examples: their ``keys`` (B,), ``states`` (B, L, D) and which are there, ``mask`` (B, L)."""
        unit = torch.nn.functional.normalize(widen(torch.where(mask[:, :, None], states, 0.0)), dim=2)
        together = mask[:, :, None] & mask[:, None, :]
        cosines = torch.where(together, unit @ unit.transpose(1, 2), 0.0)
        self._add(keys, torch.stack([cosines, together.to(cosines.dtype)], dim=1))

    def compute(self) -> Tensor:
        keys, values = self._unique()
        if not len(keys):
            return torch.full((len(self.languages), len(self.languages)), float("nan"), dtype=torch.float64)
        sums, counts = values.sum(0)
        return sums / counts  # 0 / 0 is NaN: no example has both languages

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """A heatmap on ``ax`` (a new figure without one); returns figure and axes."""
        from lightning_mlc.report.plots import draw_cosines, figure_and_axes

        figure, axes = figure_and_axes(ax)
        draw_cosines(axes, (self.compute() if val is None else val).tolist(), self.languages)
        return figure, axes
