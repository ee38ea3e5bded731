"""How close to one line a prompt's representations lie."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mlc.metrics.cosines import pair_cosines
from lightning_mlc.metrics.keyed import KeyedMetric, widen
from mlc_kernels import loss_floor, mlc_loss, singular_values

MEASURES = ("loss", "excess", "explained_variance", "min_cosine")
"""What :class:`Collinearity` reports."""


@torch.no_grad()
def collinearity(
    states: Tensor, mask: Tensor, temperature: float = 0.2, scale: Literal["top", "none"] = "top"
) -> dict[str, Tensor]:
    """Measures of each prompt's rows ``states`` (B, L, D) where ``mask`` (B, L) is True.

    A row of zeros has no direction and counts as missing. Half precision is computed in float64. Nothing
    here waits for the device beyond what the operator's eigen-solver does.

    Returns:
        (B,) each: ``valid`` (whether two or more rows are there), and, NaN where not valid or where a row is
        not finite, ``loss`` and ``excess`` (the MLC loss, and by how much it is above its floor),
        ``explained_variance`` (``s_1^2 / sum s^2``: 1 on one line) and ``min_cosine`` (the smallest cosine
        of two rows: opposite rows are on one line too, and only this tells).

    Raises:
        TypeError: ``states`` is not floating point, or ``mask`` not bool.
        ValueError: The shapes do not fit.
    """
    cosines, usable = pair_cosines(states, mask)
    finite = cosines.diagonal(dim1=1, dim2=2).isfinite()
    count = usable.sum(1)
    # The eigen-solver raises on NaN, on account of one example for the whole batch: rows that are not
    # finite are kept from it, and their example is made NaN below.
    rows, solvable = widen(states), usable & finite
    losses = mlc_loss(rows, solvable, temperature=temperature, scale=scale, reduction="none")
    squares = singular_values(rows, solvable).square()
    pairs = usable[:, :, None] & usable[:, None, :]
    measures = {
        "loss": losses,
        "excess": losses - loss_floor(count, temperature, scale),
        "explained_variance": squares[:, 0] / squares.sum(1),
        "min_cosine": cosines.masked_fill(~pairs, float("inf")).amin((1, 2)),
    }
    valid = count >= 2
    known = valid & finite.all(1)
    return {"valid": valid} | {name: torch.where(known, value, float("nan")) for name, value in measures.items()}


class Collinearity(KeyedMetric):
    """Means of :func:`collinearity` over the examples with two or more languages.

    ``compute`` gives a dict of ``loss``, ``excess``, ``explained_variance`` and ``min_cosine``; NaN without
    such examples.

    Args:
        temperature: Of the MLC loss.
        scale: Of the MLC loss.
    """

    def __init__(self, temperature: float = 0.2, scale: Literal["top", "none"] = "top", **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.scale: Literal["top", "none"] = scale
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # No samples, but with their shape: a process that never gets any must still send the others
        # tensors like theirs.
        none = torch.zeros(0, 1, 1, device=self.device)
        self.update(none[:, 0, 0].long(), none, none[:, :, 0].bool())

    def update(self, keys: Tensor, states: Tensor, mask: Tensor) -> None:
        """Add B examples: their ``keys`` (B,), ``states`` (B, L, D) and which are there, ``mask`` (B, L)."""
        found = collinearity(states, mask, self.temperature, self.scale)
        values = torch.stack([found[name] for name in MEASURES], dim=1)
        self._add(keys[found["valid"]], values[found["valid"]])

    def compute(self) -> dict[str, Tensor]:
        """() each: the means over examples."""
        keys, values = self._unique()
        # No samples have no shape of their own; their mean is NaN.
        means = values.reshape(len(keys), len(MEASURES)).mean(0)
        return dict(zip(MEASURES, means, strict=True))

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Bars of the two measures that end at 1, of ``val`` (what ``compute`` gives if None).

        Returns:
            The figure and the axes (``ax``, or those of a new figure).
        """
        from lightning_mlc.report.plots import AFTER, draw_bars, figure_and_axes

        results = self.compute() if val is None else val
        figure, axes = figure_and_axes(ax, width=4.0, height=3.0)
        names = ["explained_variance", "min_cosine"]
        draw_bars(axes, names, [("", [float(results[name]) for name in names], AFTER)])
        return figure, axes
