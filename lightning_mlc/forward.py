"""Run a batch through the policy and lay the results out by example and language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mlc.data.batches import CHOSEN, KINDS, MISMATCHED, NO_RESPONSE, REJECTED, Batch, TokenRows
from lightning_mlc.models.policy import Policy, RowOutputs
from lightning_mlc.objectives import Objective, Responses, Scores


class Grid(NamedTuple):
    """Results for B examples in L languages. Rows find their place by the ids they carry."""

    logps: Tensor
    """(B, L, 3) float32, summed log-probability of the chosen, the rejected and the mismatched response."""
    tokens: Tensor
    """(B, L, 3) float32, number of their tokens; 0 where no such row was run."""
    states: Tensor | None
    """(B, L, H), hidden state at the end of the prompt."""
    present: Tensor
    """(B, L) bool, whether the example's prompt was run in the language."""

    def scores(self, kind: int, reference: Grid | None = None, language: int | None = None) -> Scores:
        """Scores (B, L) of the responses of a kind, such as ``CHOSEN``; (B,) for one ``language``."""
        where = (slice(None), slice(None) if language is None else language, kind)
        return Scores(
            logps=self.logps[where],
            tokens=self.tokens[where],
            reference_logps=None if reference is None else reference.logps[where],
        )

    def responses(self, objective: Objective, reference: Grid | None, language: int) -> Responses:
        """What ``objective`` needs, in one ``language``: scores (B,)."""
        return Responses(
            chosen=self.scores(CHOSEN, reference, language),
            rejected=self.scores(REJECTED, reference, language) if objective.needs_rejected else None,
            mismatched=self.scores(MISMATCHED, reference, language) if objective.needs_mismatched else None,
        )


def run_batch(policy: Policy, batch: Batch, layer: int | None = None) -> Grid:
    """All rows of ``batch`` through ``policy``, with the hidden states of ``layer`` if one is given."""
    rows = [*batch.responses, *batch.prompts]
    outputs = [policy(part, layer) for part in rows]
    with torch.no_grad():
        outputs += [policy(part) for part in batch.mismatched]
    return _arrange(outputs, [*rows, *batch.mismatched], len(batch), len(batch.languages))


def _arrange(outputs: Sequence[RowOutputs], rows: Sequence[TokenRows], examples: int, languages: int) -> Grid:
    cells = examples * languages
    cell = torch.cat([part.example * languages + part.language for part in rows])
    kind = torch.cat([part.kind for part in rows])
    spare = torch.full_like(cell, cells)  # one cell beyond the grid takes what has no place in it

    def place(values: Tensor, index: Tensor, size: int) -> Tensor:
        empty = values.new_zeros((size + 1, *values.shape[1:]))
        return empty.index_copy(0, index, values)[:-1]

    response = torch.where(kind == NO_RESPONSE, KINDS * spare, KINDS * cell + kind)
    # Rows of one cell have the same prompt, and its state: it is taken from the rejected row only where there is no
    # chosen one, and never from a mismatched one.
    yes = torch.ones_like(kind, dtype=torch.bool)
    with_chosen = place(yes, torch.where(kind == CHOSEN, cell, spare), cells)
    repeats = (kind == REJECTED) & with_chosen[cell] | (kind == MISMATCHED)
    prompt = torch.where(repeats, spare, cell)
    states = [output.states for output in outputs if output.states is not None]
    return Grid(
        logps=place(torch.cat([o.logps for o in outputs]), response, KINDS * cells).view(examples, languages, KINDS),
        tokens=place(torch.cat([o.tokens for o in outputs]), response, KINDS * cells).view(examples, languages, KINDS),
        # Mismatched rows come last and have none.
        states=place(torch.cat(states), prompt[: sum(map(len, states))], cells).view(examples, languages, -1)
        if states
        else None,
        present=place(yes, prompt, cells).view(examples, languages),
    )
