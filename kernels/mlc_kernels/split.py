"""Which inputs of the Triton backend get a split Gram matrix, or one warp.

One program per prompt leaves most of a GPU idle if prompts are few, and its Gram matrix takes as long as it has
features. So ``gram_parts`` can share the features out among several programs, and the loss kernel adds their matrices.
That costs one launch more. The loss kernel can also run with one warp, which needs no barriers, but multiplies more
slowly. Only a GPU can tell where this pays.
"""

from __future__ import annotations

from typing import NamedTuple


class Split(NamedTuple):
    """A choice for a range of inputs."""

    tile: int
    """L, padded to 16 or 32. (For 64 the compiler spills registers when it adds parts.)"""
    features: range
    """Values of D."""
    prompts: range
    """Values of B."""
    parts: int
    """Parts of the features. 1: the loss kernel computes the Gram matrix itself."""
    one_warp: bool
    """Whether the loss kernel has one warp, in place of its usual number. Only for a tile of 16."""


SPLITS: tuple[Split, ...] = ()
"""The first that fits is taken. If none does, the loss kernel computes the Gram matrix itself, with its usual warps.

Empty until a GPU has measured it. ``python -m benchmarks.split``, on a GPU that nothing else uses, times the candidates
and prints the rows to paste here. Where it prints no row, the usual way was the fastest. The choice depends on sizes
alone, so that the same input gives the same bits.
"""


def split_of(tile: int, features: int, prompts: int) -> Split | None:
    """The first of ``SPLITS`` that fits."""
    for split in SPLITS:
        if split.tile == tile and features in split.features and prompts in split.prompts:
            return split
    return None
