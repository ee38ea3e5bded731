"""Run a batch through the policy and lay the results out by example and language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.rows import NO_RESPONSE, TokenRows
from lightning_mlc.models.policy import Policy, RowOutputs
from lightning_mlc.objectives import Scores


class Grid(NamedTuple):
    """Results for B examples in L languages. Rows find their place by the ids they carry."""

    logps: Tensor
    """(B, L, 2) float32, summed log-probability of the chosen and the rejected response."""
    tokens: Tensor
    """(B, L, 2) float32, number of their tokens; 0 where no such row was run."""
    states: Tensor | None
    """(B, L, H), hidden state at the end of the prompt."""
    present: Tensor
    """(B, L) bool, whether the example's prompt was run in the language."""

    def scores(self, kind: int, reference: Grid | None = None, language: int | None = None) -> Scores:
        """Scores (B, L) of the ``CHOSEN`` or ``REJECTED`` responses; (B,) for one ``language``."""
        where = (slice(None), slice(None) if language is None else language, kind)
        return Scores(
            logps=self.logps[where],
            tokens=self.tokens[where],
            reference_logps=None if reference is None else reference.logps[where],
        )


def run_batch(policy: Policy, batch: Batch, layer: int | None = None) -> Grid:
    """All rows of ``batch`` through ``policy``, with the hidden states of ``layer`` if one is given."""
    rows = [*batch.responses, *batch.prompts]
    return _arrange([policy(part, layer) for part in rows], rows, len(batch), len(batch.languages))


def _arrange(outputs: Sequence[RowOutputs], rows: Sequence[TokenRows], examples: int, languages: int) -> Grid:
    device = rows[0].input_ids.device
    cells = examples * languages
    cell = torch.cat([part.example * languages + part.language for part in rows])
    kind = torch.cat([part.kind for part in rows])
    spare = torch.full_like(cell, cells)  # one cell beyond the grid takes what has no place in it

    def place(values: Tensor, index: Tensor, size: int) -> Tensor:
        empty = values.new_zeros((size + 1, *values.shape[1:]))
        return empty.index_copy(0, index, values)[:-1]

    response = torch.where(kind == NO_RESPONSE, 2 * spare, 2 * cell + kind)
    # Sequences with the same prompt all have its state; one of them gives it.
    prompt = torch.where(torch.cat([part.leads for part in rows]), cell, spare)
    states = [output.states for output in outputs if output.states is not None]
    return Grid(
        logps=place(torch.cat([o.logps for o in outputs]), response, 2 * cells).view(examples, languages, 2),
        tokens=place(torch.cat([o.tokens for o in outputs]), response, 2 * cells).view(examples, languages, 2),
        states=place(torch.cat(states), prompt, cells).view(examples, languages, -1) if states else None,
        present=place(torch.ones(len(cell), dtype=torch.bool, device=device), prompt, cells).view(examples, languages),
    )
