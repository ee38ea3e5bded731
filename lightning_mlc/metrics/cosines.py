"""Cosines between languages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.consistency.measures import pair_cosines
from lightning_mlc.metrics.keyed import KeyedMetric


class LanguageCosines(KeyedMetric):
    """Mean cosine between the states of a prompt for each pair of languages.

    ``compute`` returns (L, L): the mean over the examples that have both languages, NaN if none has.

    Args:
        languages: BCP-47 codes of the L languages.
        **options: Options of ``torchmetrics.Metric``.
    """

    def __init__(self, languages: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.languages = tuple(languages)
        self.reset()

    def _add_none(self) -> None:
        none = torch.zeros(0, len(self.languages), 1, device=self.device)
        self.update(none[:, 0, 0].long(), none, none[:, :, 0].bool())

    def update(self, keys: Tensor, states: Tensor, mask: Tensor) -> None:
        """Add B examples.

        Args:
            keys: (B,) int64 keys of the examples.
            states: (B, L, D) states of the prompts.
            mask: (B, L) bool, False where a state is missing.
        """
        cosines, usable = pair_cosines(states, mask)
        together = usable[:, :, None] & usable[:, None, :]
        self._add(keys, torch.stack([cosines, together.to(cosines.dtype)], dim=1))

    def compute(self) -> Tensor:
        """Return the mean cosines, (L, L)."""
        keys, values = self._unique()
        size = len(self.languages)
        totals: Tensor = values.reshape(len(keys), 2, size, size).sum(0)  # values is (0,) without samples
        return totals[0] / totals[1]  # 0 / 0 is NaN: no example has both languages

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw a heatmap.

        Args:
            val: (L, L), a result of ``compute``. None: the current one.
            ax: Axes of matplotlib. None: those of a new figure.

        Returns:
            The figure and the axes.
        """
        from lightning_mlc.report.plots import draw_cosines, figure_and_axes

        figure, axes = figure_and_axes(ax, width=5.0, height=4.6)
        draw_cosines(axes, (self.compute() if val is None else val).tolist(), self.languages)
        return figure, axes
