"""How close the representations of prompts lie to one line, averaged over a data set."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mlc.consistency.measures import collinearity
from lightning_mlc.metrics.keyed import KeyedMetric

MEASURES = ("loss", "excess", "explained_variance", "min_cosine")
"""The measures that :class:`Collinearity` reports."""


class Collinearity(KeyedMetric):
    """Means of :func:`~lightning_mlc.consistency.measures.collinearity` over the examples with two or more languages.

    ``compute`` returns a dict of ``loss``, ``excess``, ``explained_variance`` and ``min_cosine``, which are NaN without
    such examples.

    Args:
        temperature: Temperature of the MLC loss.
        scale: Scale of the MLC loss.
        **options: Options of ``torchmetrics.Metric``.
    """

    def __init__(self, temperature: float = 0.2, scale: Literal["top", "none"] = "top", **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.scale: Literal["top", "none"] = scale
        self.reset()

    def _add_none(self) -> None:
        none = torch.zeros(0, 1, 1, device=self.device)
        self.update(none[:, 0, 0].long(), none, none[:, :, 0].bool())

    def update(self, keys: Tensor, states: Tensor, mask: Tensor) -> None:
        """Add B examples.

        Args:
            keys: (B,) int64 keys of the examples.
            states: (B, L, D) representations.
            mask: (B, L) bool, False where a representation is missing.
        """
        found = collinearity(states, mask, self.temperature, self.scale)
        values = torch.stack([found[name] for name in MEASURES], dim=1)
        self._add(keys[found["valid"]], values[found["valid"]])

    def compute(self) -> dict[str, Tensor]:
        """Return the means over examples, () each."""
        keys, values = self._unique()
        # Without samples, values has no shape of its own; the means are NaN.
        means = values.reshape(len(keys), len(MEASURES)).mean(0)
        return dict(zip(MEASURES, means, strict=True))

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw ``explained_variance`` and ``min_cosine`` as bars.

        Args:
            val: A result of ``compute``. None: the current one.
            ax: Axes of matplotlib. None: those of a new figure.

        Returns:
            The figure and the axes.
        """
        from lightning_mlc.report.plots import AFTER, draw_bars, figure_and_axes

        results = self.compute() if val is None else val
        figure, axes = figure_and_axes(ax, width=4.0, height=3.0)
        names = ["explained_variance", "min_cosine"]
        draw_bars(axes, names, [("", [float(results[name]) for name in names], AFTER)])
        return figure, axes
