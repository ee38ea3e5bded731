"""Run a batch through the policy, and arrange the results by example and language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.rows import CHOSEN, KINDS, MISMATCHED, REJECTED, TokenRows
from lightning_mlc.models.next_tokens import NextTokens
from lightning_mlc.models.policy import Policy, RowOutputs
from lightning_mlc.objectives import Responses, Scores


class Grid(NamedTuple):
    """Results for B examples in L languages."""

    logps: Tensor
    """(B, L, 3) float32: summed log-probability of the chosen, the rejected and the mismatched response."""
    tokens: Tensor
    """(B, L, 3) float32: numbers of their tokens; 0 if the response was not run."""
    states: Tensor | None
    """(B, L, H): hidden state at the end of the prompt."""
    present: Tensor
    """(B, L) bool: whether the example's prompt was run in the language."""
    pooled: Tensor | None = None
    """(B, 2, H) float32: state after the last layer, averaged over the tokens of the prompt and the chosen (0) or
    rejected (1) response in the source language."""
    next_tokens: NextTokens | None = None
    """Logits of the next token at the first positions of the response."""

    def scores(self, kind: int, reference: Grid | None = None, language: int | None = None) -> Scores:
        """Return the scores of one kind of response.

        Args:
            kind: ``CHOSEN``, ``REJECTED`` or ``MISMATCHED``.
            reference: Results of the reference model. If it scored a response of another length, and so another
                response, its score becomes NaN.
            language: Index of a language. None: all languages.

        Returns:
            (B,) scores, or (B, L) for all languages.
        """
        where = (slice(None), slice(None) if language is None else language, kind)
        logps, tokens = self.logps[where], self.tokens[where]
        if reference is None:
            return Scores(logps, tokens, None)
        same = reference.tokens[where] == tokens
        return Scores(logps, tokens, torch.where(same, reference.logps[where], float("nan")))

    def responses(self, reference: Grid | None, language: int, rejected: bool, mismatched: bool) -> Responses:
        """Return the scores of the responses in one language.

        Args:
            reference: Results of the reference model, if it is needed.
            language: Index of the language.
            rejected: Whether to include rejected responses.
            mismatched: Whether to include mismatched responses.
        """
        return Responses(
            chosen=self.scores(CHOSEN, reference, language),
            rejected=self.scores(REJECTED, reference, language) if rejected else None,
            mismatched=self.scores(MISMATCHED, reference, language) if mismatched else None,
        )


def run_batch(
    policy: Policy,
    batch: Batch,
    layer: int | None = None,
    pool: bool = False,
    positions: int = 0,
    span: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Grid:
    """Run all rows of a batch.

    Args:
        policy: The model.
        batch: The batch, on the model's device.
        layer: Index of the hidden states to return at the ends of the prompts. None: none.
        pool: Whether to return ``Grid.pooled``.
        positions: Number of first positions for ``Grid.next_tokens``. 0: none.
        span: Makes a context from a name, for profilers. It is entered once for the responses and once for the
            translations.
    """
    with span("responses forward") if batch.responses else nullcontext():
        responses = [policy(part, layer, pool, positions) for part in batch.responses]
        with torch.no_grad():
            mismatched = [policy(part) for part in batch.mismatched]
    others = [*batch.translations, *batch.prompts]
    with span("translations forward") if others else nullcontext():
        translations = [policy(part, layer, False, positions) for part in others]
    rows = [*batch.responses, *others, *batch.mismatched]
    grid = _arrange([*responses, *translations, *mismatched], rows, len(batch), len(batch.languages))
    if positions:
        read = [
            (output.next_logits, part)
            for output, part in zip([*responses, *translations], [*batch.responses, *others], strict=True)
            if output.next_logits is not None
        ]
        grid = grid._replace(next_tokens=NextTokens.of(read, len(batch), len(batch.languages), positions))
    return grid._replace(pooled=_source_means(responses, batch)) if pool else grid


def _source_means(outputs: Sequence[RowOutputs], batch: Batch) -> Tensor:
    """(B, 2, H): pooled states of the source-language rows, by kind of response."""
    means = torch.cat([output.pooled for output in outputs if output.pooled is not None])
    example, language, kind = (
        torch.cat([getattr(part, name) for part in batch.responses]) for name in ("example", "language", "kind")
    )
    belongs = (language == batch.source) & ((kind == CHOSEN) | (kind == REJECTED))
    spare = 2 * len(batch)
    index = torch.where(belongs, 2 * example + kind, spare)
    return means.new_zeros(spare + 1, means.shape[1]).index_copy(0, index, means)[:-1].view(len(batch), 2, -1)


def _arrange(outputs: Sequence[RowOutputs], rows: Sequence[TokenRows], examples: int, languages: int) -> Grid:
    cells = examples * languages
    cell = torch.cat([part.example * languages + part.language for part in rows])
    kind = torch.cat([part.kind for part in rows])
    spare = torch.full_like(cell, cells)  # index of an extra cell for values that belong nowhere

    def place(values: Tensor, index: Tensor, size: int) -> Tensor:
        empty = values.new_zeros((size + 1, *values.shape[1:]))
        return empty.index_copy(0, index, values)[:-1]

    response = torch.where(kind < 0, KINDS * spare, KINDS * cell + kind)
    # All sequences with the same prompt have its state. Take it from the one that leads.
    prompt = torch.where(torch.cat([part.leads for part in rows]), cell, spare)
    states = [output.states for output in outputs if output.states is not None]
    return Grid(
        logps=place(torch.cat([o.logps for o in outputs]), response, KINDS * cells).view(examples, languages, KINDS),
        tokens=place(torch.cat([o.tokens for o in outputs]), response, KINDS * cells).view(examples, languages, KINDS),
        # Mismatched rows come last and have no states.
        states=place(torch.cat(states), prompt[: sum(map(len, states))], cells).view(examples, languages, -1)
        if states
        else None,
        present=place(torch.ones_like(cell, dtype=torch.bool), prompt, cells).view(examples, languages),
    )
