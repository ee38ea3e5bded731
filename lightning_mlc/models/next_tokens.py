"""Distributions of the next token at the first positions of a response, by example, language and position.

Position 1 is the end of the prompt, which predicts the first token of the response; position k is its token k - 1.
Consistency terms compare these distributions between languages, or with those of the reference. Logits exist for these
positions only, in the precision of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mlc.data.rows import BEGINNING, TokenRows


class NextTokens(NamedTuple):
    """Logits of the next token at P positions, for B examples in L languages with at most K positions each."""

    logits: Tensor
    """(P, V) floating point."""
    cell: Tensor
    """(P,) int64, place of each in the flattened table (B, L, K); B * L * K for one that belongs to no example."""
    shape: tuple[int, int, int]
    """B, L and K."""

    @classmethod
    def of(
        cls, passes: Sequence[tuple[Tensor, TokenRows]], examples: int, languages: int, positions: int
    ) -> NextTokens:
        """Sort the results of several passes.

        Args:
            passes: Logits (P_i, V) of each pass, at the first P_i entries of ``TokenRows.first``, and what it ran.
            examples: Number of examples B.
            languages: Number of languages L.
            positions: Number of positions K.
        """
        shape = (examples, languages, positions)
        cells = [_cells(rows, shape) for _, rows in passes]
        return cls(torch.cat([logits for logits, _ in passes]), torch.cat(cells), shape)

    @property
    def table(self) -> Tensor:
        """(B, L, K) int64: which row of ``logits`` belongs to a position; -1 if there is none."""
        return self.spread(torch.arange(len(self.cell), device=self.cell.device), missing=-1)

    def spread(self, values: Tensor, missing: float = 0) -> Tensor:
        """Arrange values of the P positions in a table.

        Args:
            values: (P,).
            missing: Value of positions that do not exist.

        Returns:
            (B, L, K).
        """
        size = self.shape[0] * self.shape[1] * self.shape[2]
        return values.new_full((size + 1,), missing).index_copy(0, self.cell, values)[:-1].view(self.shape)


def _cells(rows: TokenRows, shape: tuple[int, int, int]) -> Tensor:
    examples, languages, positions = shape
    count = rows.num_first(positions)
    sequence = rows.first_sequence[:count]
    place = (rows.example * languages + rows.language).index_select(0, sequence) * positions
    place = place + rows.first_position[:count]
    # A sequence that does not lead has no positions, unless it is there for them. (Passes that only keep several
    # processes in step have one that belongs nowhere.)
    belongs = rows.leads | (rows.kind == BEGINNING)
    return torch.where(belongs.index_select(0, sequence), place, examples * languages * positions)
