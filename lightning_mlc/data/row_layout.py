"""How the sequences of a batch are arranged in rows: padded, or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from lightning_mlc.data.rows import Piece, TokenRows, TokenSequence, length_of

_WASTE_PADDED = 0.25
"""Largest share of padding in a block of padded rows. Lengths differ by a factor of five or more between languages."""
_WASTE_PACKED = 0.05
"""Largest share of padding in a block of packed rows. All rows but the last are nearly full; in a single block the last
one would be padded to their length, which is 9 % of the tokens for two prompts in ten languages. With this share it is
3 to 4 %, usually in two blocks, each of them one pass of the model."""


@dataclass(frozen=True)
class Layout:
    """How sequences are arranged in rows.

    The attention of a model decides which arrangements it can run, and which is cheapest: see
    :mod:`lightning_mlc.models.attention`.

    Args:
        packed: Put several sequences into a row, which do not see each other; otherwise each row is one sequence.
        share_prompts: In packed rows, run a prompt once for all of its responses. This needs attention with a mask of
            any form.
        one_row: Pack a block into one row. This suits attention that skips the tokens that a token does not see. With
            a dense mask, attention costs the square of the row's length, so rows are then as short as possible.
        few_passes: Put packed rows into one block, however much padding that takes. This suits a sharded model, whose
            weights are gathered again for each pass.
    """

    packed: bool = False
    share_prompts: bool = True
    one_row: bool = False
    few_passes: bool = False

    def blocks(
        self, rows: Sequence[TokenSequence], pad_id: int, max_tokens: int | None = None
    ) -> tuple[TokenRows, ...]:
        """Arrange ``rows`` in blocks, which are run one after the other.

        Args:
            rows: The sequences.
            pad_id: Token id of padding.
            max_tokens: Most tokens of a block, padding included; a block has at least one piece. None sets no limit.
        """
        if not rows:
            return ()
        if not self.packed:
            return pad_in_chunks(rows, pad_id, max_tokens=max_tokens)
        pieces = _pieces(rows) if self.share_prompts else [(row,) for row in rows]
        width = max(map(length_of, pieces))
        if self.one_row:
            contents = [pieces] if max_tokens is None else _fill(pieces, max(max_tokens, width))
            return tuple(TokenRows.pack([content], pad_id) for content in contents)
        waste = 1.0 if self.few_passes else _WASTE_PACKED
        blocks = _alike(_fill(pieces, width), _content, waste, max_tokens)
        return tuple(TokenRows.pack(block, pad_id) for block in blocks)


def _pieces(rows: Sequence[TokenSequence]) -> list[Piece]:
    """Sequences grouped by their prompt."""
    found: dict[tuple[int, int], list[TokenSequence]] = {}
    for row in rows:
        found.setdefault((row.example, row.language), []).append(row)
    return list(found.values())


def _content(pieces: Sequence[Piece]) -> int:
    """Number of tokens of a row with these ``pieces``."""
    return sum(map(length_of, pieces))


def _fill(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """Put ``pieces`` into rows of at most ``capacity`` tokens: the longest first, each into the first row with room."""
    rows: list[list[Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=length_of, reverse=True):
        length = length_of(piece)
        index = next((i for i, left in enumerate(room) if length <= left), None)
        if index is None:
            index = len(rows)
            rows.append([])
            room.append(capacity)
        rows[index].append(piece)
        room[index] -= length
    return rows


def pad_in_chunks(
    rows: Sequence[TokenSequence], pad_id: int, max_tokens: int | None = None, side: Literal["left", "right"] = "right"
) -> tuple[TokenRows, ...]:
    """Arrange ``rows`` in a few padded blocks of similar lengths; see :meth:`Layout.blocks`."""
    return tuple(TokenRows.pad(block, pad_id, side) for block in _alike(rows, len, _WASTE_PADDED, max_tokens))


_T = TypeVar("_T")


def _alike(rows: Sequence[_T], length: Callable[[_T], int], max_waste: float, max_tokens: int | None) -> list[list[_T]]:
    """Group ``rows`` in blocks of similar ``length``, the shortest first.

    A new block begins where padding would exceed the share ``max_waste`` of a block, or the block ``max_tokens``.
    """
    blocks: list[list[_T]] = []
    tokens = 0
    for row in sorted(rows, key=length):
        if blocks:
            padded = (len(blocks[-1]) + 1) * length(row)
            if (1 - max_waste) * padded <= tokens + length(row) and (max_tokens is None or padded <= max_tokens):
                blocks[-1].append(row)
                tokens += length(row)
                continue
        blocks.append([row])
        tokens = length(row)
    return blocks
