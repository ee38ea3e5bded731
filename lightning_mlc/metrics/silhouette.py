"""Whether hidden states cluster by prompt or by language.

States that are the same thing in every language cluster by prompt: a prompt's translations are close together and far
from other prompts. States that are about the language cluster by language, whatever the prompt. arXiv 2604.12710 calls
a layer whose geometry is governed by meaning rather than by language the semantic bottleneck, and aligns there. The
measure here is this project's: the mean silhouette coefficient (Rousseeuw 1987) of the same states, once with the
prompts as clusters and once with the languages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mlc.consistency.measures import unit_rows, widen

ROUNDING = 1e-12
"""A centred state that is shorter than this share of the longest state is rounding of the mean, and has no
direction. Differences in float32, the dtype of the states, are a share of 1e-7 or more."""


class Silhouettes(NamedTuple):
    """Mean silhouette coefficients of the same states, () float64 from -1 to 1 each."""

    by_prompt: Tensor
    """The translations of a prompt are a cluster."""
    by_language: Tensor
    """The prompts in a language are a cluster."""


def silhouette(distances: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean silhouette coefficient.

    With ``a`` the mean distance of a point to the others in its cluster, and ``b`` the smallest mean distance to
    another cluster, the coefficient of the point is ``(b - a) / max(a, b)``. It is 0 for a point that is alone in its
    cluster, or if both are 0. Rousseeuw (1987), as in ``sklearn.metrics.silhouette_score``.

    Args:
        distances: (N, N) floating point: symmetric, with zeros on the diagonal.
        labels: (N,) int64: the cluster of each point.

    Returns:
        () in the dtype of ``distances``, from -1 to 1. NaN if there are fewer than two clusters, or as many as points.
    """
    clusters, own = torch.unique(labels, return_inverse=True)
    if not 2 <= len(clusters) < len(labels):
        return distances.new_tensor(float("nan"))
    member = torch.nn.functional.one_hot(own, len(clusters)).to(distances.dtype)
    sizes = member.sum(0)
    totals = distances @ member
    others = sizes[own] - 1
    within = totals.gather(1, own[:, None])[:, 0] / others.clamp(min=1)
    between = (totals / sizes).masked_fill(member.bool(), float("inf")).amin(1)
    larger = torch.maximum(within, between)
    defined = (others > 0) & (larger != 0)  # also true for NaN, so that an error stays visible
    return torch.where(defined, (between - within) / torch.where(defined, larger, 1.0), 0.0).mean()


def silhouettes(states: Tensor, mask: Tensor) -> Silhouettes:
    """Compute how well hidden states of one layer cluster by prompt, and how well by language.

    The distance is 1 minus the cosine of *centred* states: the mean over prompts and languages is subtracted first. Raw
    states share a large common direction. All of their cosines are near 1, where the distance is the square of a small
    angle, and how small differs from layer to layer. Centred states have distances from 0 to 2 in every layer, so that
    layers can be compared.

    Prompts in fewer than two languages take no part. A state that is the mean has no direction, and counts as missing:
    at the embeddings all states are of the same token.

    Both values depend on the number of prompts and languages, because ``b`` of :func:`silhouette` is the smallest of
    the other clusters. Compare layers and models on the same prompts only.

    Args:
        states: (B, L, D) floating point: states of B prompts in L languages.
        mask: (B, L) bool: False where a state is missing. Its values are ignored.

    Returns:
        The two silhouettes. They are NaN where one is undefined: fewer than two prompts, or languages, are left.
    """
    mask = mask & (mask.sum(1, keepdim=True) >= 2)
    rows = widen(torch.where(mask[:, :, None], states, 0.0))
    longest = rows.norm(dim=2).amax() if mask.any() else rows.new_zeros(())
    centred = rows - rows[mask].mean(0)
    there = mask & ~(centred.norm(dim=2) <= ROUNDING * longest)
    there = there & (there.sum(1, keepdim=True) >= 2)
    unit = unit_rows(centred, there)[0][there]
    distances = (1 - unit @ unit.T).clamp(0, 2).fill_diagonal_(0.0)
    prompt, language = there.nonzero(as_tuple=True)
    return Silhouettes(silhouette(distances, prompt), silhouette(distances, language))
