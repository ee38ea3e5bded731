"""How the sequences of a batch are laid out in rows: padded, or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from lightning_mlc.data.rows import Piece, Row, TokenRows, length_of

_WASTE_PADDED = 0.25
"""Largest share of padding in a block of padded rows: languages differ in length by a factor of five and more."""
_WASTE_PACKED = 0.05
"""The same of packed rows. All but the last are nearly full, and one block would pad that one to their length: 9 % of
two prompts in ten languages. With this share it is 3 to 4 %, in two blocks as a rule, each a pass of its own."""


@dataclass(frozen=True)
class Layout:
    """Padded rows hold one sequence each. Packed rows hold several, which do not see each other.

    Which of them a model can run, and which is cheapest, depends on its attention: see
    :mod:`lightning_mlc.models.attention`.
    """

    packed: bool = False
    share_prompts: bool = True
    """In packed rows, run a prompt once for all of its responses. Takes attention with a mask of any form."""
    one_row: bool = False
    """Pack a block into one row, for attention that skips what a token does not see. With a dense mask the
    attention of a row costs its length squared; rows are then no longer than the longest piece needs."""
    few_passes: bool = False
    """Put packed rows into one block, whatever it pads, for a model whose weights are gathered anew for each pass."""

    def blocks(self, rows: Sequence[Row], pad_id: int, max_tokens: int | None = None) -> tuple[TokenRows, ...]:
        """``rows`` in blocks to be run one after the other, of at most ``max_tokens`` (but one piece at least)."""
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


def _pieces(rows: Sequence[Row]) -> list[Piece]:
    """Rows with the same prompt together."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.example, row.language), []).append(row)
    return list(found.values())


def _content(pieces: Sequence[Piece]) -> int:
    """Tokens of a row that holds ``pieces``."""
    return sum(map(length_of, pieces))


def _fill(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """``pieces`` in rows of at most ``capacity`` tokens, each in the first that has room, the longest first."""
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
    rows: Sequence[Row], pad_id: int, max_tokens: int | None = None, side: Literal["left", "right"] = "right"
) -> tuple[TokenRows, ...]:
    """``rows`` as a few padded blocks of similar length, of at most ``max_tokens`` (but one row at least)."""
    return tuple(TokenRows.pad(block, pad_id, side) for block in _alike(rows, len, _WASTE_PADDED, max_tokens))


_T = TypeVar("_T")


def _alike(rows: Sequence[_T], length: Callable[[_T], int], max_waste: float, max_tokens: int | None) -> list[list[_T]]:
    """``rows`` in blocks of similar ``length``, shortest first.

    A new block begins where padding would exceed the share ``max_waste`` of a block, or a block ``max_tokens``.
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
