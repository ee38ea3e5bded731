"""How close to one line a prompt's representations lie."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric, widen
from mlc_kernels import loss_floor, mlc_loss, singular_values

MEASURES = ("loss", "excess", "explained_variance", "min_cosine")


@torch.no_grad()
def collinearity(
    states: Tensor, mask: Tensor, temperature: float = 0.2, scale: Literal["top", "none"] = "top"
) -> dict[str, Tensor]:
    """Measures of each prompt's rows ``states`` (B, L, D) where ``mask`` (B, L) is True.

    Returns (B,) each: ``valid`` (whether two or more rows are there; the others mean nothing where not),
    ``loss`` and ``excess`` (the MLC loss, and by how much it is above its floor), ``explained_variance``
    (``s_1^2 / sum s^2``: 1 on one line) and ``min_cosine`` (the smallest cosine of two rows: opposite rows
    are on one line too, and only this tells). Does not wait for the device.
    """
    states = widen(states)
    values = singular_values(states, mask)
    losses = mlc_loss(states, mask, temperature=temperature, scale=scale, reduction="none")
    count = mask.sum(1)
    floor = loss_floor(count, temperature, scale)
    squares = values.square()
    unit = torch.nn.functional.normalize(torch.where(mask[:, :, None], states, 0.0), dim=2)
    cosines = unit @ unit.transpose(1, 2)
    pairs = mask[:, :, None] & mask[:, None, :]
    return {
        "valid": count >= 2,
        "loss": losses,
        "excess": losses - floor,
        "explained_variance": squares[:, 0] / squares.sum(1),
        "min_cosine": cosines.masked_fill(~pairs, float("inf")).amin((1, 2)),
    }


class Collinearity(KeyedMetric):
    """Means of :func:`collinearity` over the examples with two or more languages.

    Args:
        temperature: Of the MLC loss.
        scale: Of the MLC loss.
    """

    def __init__(self, temperature: float = 0.2, scale: Literal["top", "none"] = "top", **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.scale: Literal["top", "none"] = scale

    def update(self, keys: Tensor, states: Tensor, mask: Tensor) -> None:
        """Add B examples: their ``keys`` (B,), ``states`` (B, L, D) and which are there, ``mask`` (B, L)."""
        found = collinearity(states, mask, self.temperature, self.scale)
        values = torch.stack([found[name] for name in MEASURES], dim=1)
        self._add(keys[found["valid"]], values[found["valid"]])

    def compute(self) -> dict[str, Tensor]:
        keys, values = self._unique()
        means = values.mean(0) if len(keys) else torch.full((len(MEASURES),), float("nan"))
        return dict(zip(MEASURES, means, strict=True))

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """The two measures from 0 to 1 as bars on ``ax`` (a new figure without one)."""
        from lightning_mlc.report.plots import figure_and_axes

        results = self.compute() if val is None else val
        figure, axes = figure_and_axes(ax)
        names = ["explained_variance", "min_cosine"]
        axes.bar(names, [float(results[name]) for name in names])
        return figure, axes
