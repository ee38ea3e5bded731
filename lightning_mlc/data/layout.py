"""How the sequences of a batch are laid out in rows: padded, or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mlc.data.rows import Piece, Row, TokenRows, length_of


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
        packed = _fill(pieces, width)
        count = len(packed) if max_tokens is None else max(1, max_tokens // width)
        return tuple(TokenRows.pack(packed[i : i + count], pad_id) for i in range(0, len(packed), count))


def _pieces(rows: Sequence[Row]) -> list[Piece]:
    """Rows with the same prompt together."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.example, row.language), []).append(row)
    return list(found.values())


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
    rows: Sequence[Row], pad_id: int, max_waste: float = 0.25, max_tokens: int | None = None
) -> tuple[TokenRows, ...]:
    """``rows`` as a few padded blocks of similar length, shortest first.

    Languages differ in length by a factor of five and more, so one block would be mostly padding. A new
    block begins where padding would exceed the share ``max_waste`` of a block, or a block ``max_tokens``.
    """
    blocks: list[list[Row]] = []
    tokens = 0
    for row in sorted(rows, key=len):
        if blocks:
            padded = (len(blocks[-1]) + 1) * len(row)
            if (1 - max_waste) * padded <= tokens + len(row) and (max_tokens is None or padded <= max_tokens):
                blocks[-1].append(row)
                tokens += len(row)
                continue
        blocks.append([row])
        tokens = len(row)
    return tuple(TokenRows.pad(block, pad_id) for block in blocks)
