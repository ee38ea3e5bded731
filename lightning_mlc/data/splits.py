"""Which rows of a table are trained on, which are validated on, and which of those are answered."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from datasets import Dataset

from lightning_mlc.data.kinds import HARMFUL, ORDINARY, Kind
from lightning_mlc.data.sampling import spread
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


def to_answer(table: Dataset, rows: Sequence[int], most: int, split: str) -> list[int]:
    """Choose harmful and ordinary prompts from the whole of ``rows``, each prompt once.

    Args:
        table: The tokenised examples.
        rows: The rows to choose from.
        most: Largest number of prompts of a kind.
        split: ``val`` or ``test``, for messages.

    Returns:
        Places in ``rows``, harmful and ordinary prompts in turn, so that a limited validation has both.

    Raises:
        UserError: There are no prompts of a kind.
    """
    prompts = table.data.column("same_prompt").to_numpy()[rows]
    ordinary = table.data.column("ordinary").to_numpy()[rows]
    _, first = np.unique(prompts, return_index=True)
    kinds: dict[Kind, bool] = {HARMFUL: False, ORDINARY: True}
    chosen = {kind: spread(np.sort(first[ordinary[first] == value]), most) for kind, value in kinds.items()}
    where = "data.val_path (or held out by data.val_share)" if split == "val" else f"data.{split}_path"
    for kind, places in chosen.items():
        if not places:
            raise UserError(
                "model.declined",
                f"needs prompts of both kinds, and no row of {where} is of kind {kind}; add such rows, or set it to "
                "null",
            )
    return [place for pair in zip_longest(*chosen.values()) for place in pair if place is not None]
