"""Training and validation rows of one table."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from lightning_mlc.errors import UserError


def hold_out(table: Dataset, share: float, seed: int, path: str) -> tuple[list[int], list[int]]:
    """Divide the rows of ``table`` into training rows and validation rows.

    Rows with the same source prompt stay on one side, so that no validation prompt is trained on.

    Args:
        table: The tokenised examples.
        share: Share of the rows to hold out, from 0 to below 1; 0 holds out none.
        seed: Seed of the choice.
        path: Name of the file for messages.

    Returns:
        Training rows and validation rows, both in the order of the table.

    Raises:
        UserError: All rows have the same prompt.
    """
    if share == 0:
        return list(range(len(table))), []
    # Groups are numbered in the order in which they come, and only numbers are held in memory.
    prompts = table.data.column("same_prompt").to_numpy()
    _, first, group_of = np.unique(prompts, return_index=True, return_inverse=True)
    sizes = np.bincount(group_of)
    by_appearance = np.argsort(first)
    order = by_appearance[np.random.default_rng(seed).permutation(len(first))]
    wanted = max(1, round(share * len(table)))
    taken = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    is_held_out = np.isin(group_of, order[:taken])
    if is_held_out.all():
        raise UserError(
            "data.val_share",
            f"{path} has too few different prompts to hold any out; give data.val_path or set data.val_share to 0",
        )
    return np.flatnonzero(~is_held_out).tolist(), np.flatnonzero(is_held_out).tolist()
