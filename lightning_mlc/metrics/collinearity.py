"""How close the representations of a prompt lie to one line."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mlc.metrics.cosines import pair_cosines
from lightning_mlc.metrics.keyed import KeyedMetric, widen
from mlc_kernels import loss_floor, mlc_loss, singular_values

MEASURES = ("loss", "excess", "explained_variance", "min_cosine")
"""The measures that :class:`Collinearity` reports."""


@torch.no_grad()
def collinearity(
    states: Tensor, mask: Tensor, temperature: float = 0.2, scale: Literal["top", "none"] = "top"
) -> dict[str, Tensor]:
    """Measure the collinearity of each prompt's representations.

    It is computed in float64, and waits for the device only inside the operator's eigen-solver.

    Args:
        states: (B, L, D) floating point: representations of B prompts in L languages. A row of zeros has no direction
            and counts as missing.
        mask: (B, L) bool: False where a representation is missing.
        temperature: Temperature of the MLC loss.
        scale: Scale of the MLC loss, as in :class:`~lightning_mlc.consistency.mlc.MLC`.

    Returns:
        (B,) each. All but ``valid`` are NaN where ``valid`` is False or a representation is not finite.

        - ``valid``: whether the prompt has two or more representations,
        - ``loss``: the MLC loss,
        - ``excess``: the MLC loss minus its smallest possible value,
        - ``explained_variance``: ``s_1^2 / (s_1^2 + s_2^2 + ...)`` with singular values ``s``; 1 on one line,
        - ``min_cosine``: the smallest cosine between two representations. Opposite representations lie on one line
          too, and only this measure shows it.

    Raises:
        TypeError: ``states`` is not floating point, or ``mask`` is not bool.
        ValueError: The shapes do not match.
    """
    cosines, usable = pair_cosines(states, mask)
    finite = cosines.diagonal(dim1=1, dim2=2).isfinite()
    count = usable.sum(1)
    # One NaN would make the eigen-solver raise for the whole batch. So rows that are not finite are left out here, and
    # their example gets NaN below.
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

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # An empty sample with the right shape: a process without samples must still send tensors of this shape.
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
