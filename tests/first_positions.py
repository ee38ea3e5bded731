"""Logits at first positions, as a step arranges them, for tests of the terms that compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mlc.consistency import Observed
from lightning_mlc.models.forward import Grid
from lightning_mlc.models.next_tokens import NextTokens


def next_tokens(logits: Tensor, present: Tensor, lengths: Tensor | None = None, seed: int = 0) -> NextTokens:
    """The positions that exist, in an order that is drawn, and one that belongs to no example.

    Args:
        logits: (B, L, K, V).
        present: (B, L) bool.
        lengths: (B,) numbers of positions; None: K.
    """
    examples, languages, positions, _ = logits.shape
    there = present[:, :, None].expand(-1, -1, positions)
    if lengths is not None:
        there = there & (torch.arange(positions) < lengths[:, None, None])
    cells = there.flatten().nonzero().squeeze(1)
    cells = cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))]
    rows = logits.flatten(0, 2)[cells]
    nowhere = torch.tensor([there.numel()])
    return NextTokens(torch.cat([rows[:1] * 0, rows]), torch.cat([nowhere, cells]), (examples, languages, positions))


def observed(
    policy: NextTokens,
    present: Tensor,
    reference: NextTokens | None = None,
    source: int = 0,
    is_ordinary: Tensor | None = None,
) -> Observed:
    nothing = torch.zeros(*present.shape, 3)
    grids = [
        None if found is None else Grid(nothing, nothing, None, present, None, found) for found in (policy, reference)
    ]
    assert grids[0] is not None
    return Observed(grids[0], grids[1], None, source, is_ordinary)
