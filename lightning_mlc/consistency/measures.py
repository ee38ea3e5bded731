"""How close the representations of a prompt lie to one line: cosines and singular values, one prompt at a time."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mlc_kernels import loss_floor, mlc_loss, singular_values


def widen(values: Tensor) -> Tensor:
    """Convert to float64, or to float32 on MPS, which has no float64."""
    return values.float() if values.device.type == "mps" else values.double()


def unit_rows(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows to unit length.

    A row that is missing or all zeros has no direction: it is not usable, and is returned as zeros. A row that is not
    finite is usable, and becomes NaN, so that the error is visible.

    Args:
        states: (B, L, D) floating point: one row for each of L languages.
        mask: (B, L) bool: False where a row is missing. Its values are ignored.

    Returns:
        (B, L, D) rows in float64 (float32 on a device without float64).
        (B, L) bool: whether a row is usable.
    """
    # `where`, not a product, because a missing row may hold NaN.
    rows = widen(torch.where(mask[:, :, None], states, 0.0))
    largest = rows.abs().amax(2, keepdim=True)
    usable = largest != 0  # also true for NaN
    rows = rows / torch.where(usable, largest, 1.0)  # no square can overflow or underflow
    return rows / torch.where(usable, rows.norm(dim=2, keepdim=True), 1.0), usable[:, :, 0]


def pair_cosines(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cosines between the rows of each prompt.

    A row that is not usable (:func:`unit_rows`) has cosines of 0; one that is not finite has NaN.

    Args:
        states: (B, L, D) floating point: one row for each of L languages.
        mask: (B, L) bool: False where a row is missing. Its values are ignored.

    Returns:
        (B, L, L) cosines from -1 to 1, in float64 (float32 on a device without float64).
        (B, L) bool: whether a row is usable.
    """
    unit, usable = unit_rows(states, mask)
    return (unit @ unit.transpose(1, 2)).clamp(-1, 1), usable


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
