"""Self-distillation from the source language into its translations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.consistency.divergence import divergences


@dataclass(frozen=True)
class SelfDistillation(ConsistencyTerm):
    """Teaches the model after each translation of a prompt what it would say after the source prompt itself.

    The loss of a prompt is

        mean over t, k of KL(stopgrad(p_sk) || p_tk)

    where

    - ``s`` is the source language and ``t`` each other language of the prompt,
    - ``k`` is one of the first ``positions`` positions of the response in the source language,
    - ``p_tk`` is the model's distribution of the next token, over the whole vocabulary, after the prompt in language t
      and the first k - 1 tokens of that response,
    - ``stopgrad`` lets no gradient through: the source language is the teacher.

    The response is the chosen one of a pair, or the only one. It decides at which places the distributions are
    compared, and not what they should be. The end of its turn is one of its tokens. A response with fewer tokens has as
    many positions as tokens.

    The idea is that of multilingual self-distillation (arXiv 2605.02971, of which only the abstract was read): a model
    learns its own distributions in a language with more resources. According to the abstract, the model writes the
    responses there, and tokens have weights that depend on teacher and student. This form is derived here: the
    responses are those of the data, and only their first positions are compared, because a refusal usually begins
    there. All positions count alike. No published result is known for it.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term compares: ``all``, those of kind ``ordinary``, or the others (``harmful``).
        positions: Number of first positions that are compared, at least 1. Position 1 is the end of the prompt, which
            predicts the first token of the response. With 1, translations are run as prompts alone.
    """

    name: ClassVar[str] = "self_distillation"

    weight: float = 0.0
    positions: int = 8

    def __post_init__(self) -> None:
        self.check("weight", least=0)
        self.check("positions", least=1)

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions)

    def losses(self, observed: Observed) -> Tensor:
        found = observed.policy.next_tokens
        assert found is not None
        index, pairs = self._pairs(observed)
        # Which row of logits teaches each row. A row without a teacher is in no pair, and its loss is not used.
        taught_by = index[:, observed.source, None].expand_as(index).clamp(min=0).flatten()
        nothing = taught_by.new_zeros(1)
        each = divergences(found.logits, torch.cat([taught_by, nothing]).index_select(0, found.cell), found.logits)
        losses = torch.where(pairs, found.spread(each), 0.0).sum((1, 2))
        return losses / pairs.sum((1, 2)).clamp(min=1)

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """Return ``agreement``: the share of a prompt's translations whose likeliest first token is the source's."""
        found = observed.policy.next_tokens
        assert found is not None
        index, pairs = self._pairs(observed)
        first = index[:, :, 0].clamp(min=0)
        tokens = found.logits.detach().argmax(1)[first]
        agree = (tokens == tokens[:, observed.source, None]) & pairs[:, :, 0]
        return {"agreement": agree.sum(1) / pairs[:, :, 0].sum(1).clamp(min=1)}

    def _pairs(self, observed: Observed) -> tuple[Tensor, Tensor]:
        """(B, L, K) int64: rows of logits; (B, L, K) bool: whether a translation has a teacher at the position."""
        found = observed.policy.next_tokens
        assert found is not None
        index = found.table
        within = torch.arange(index.shape[2], device=index.device) < self.positions
        there = (index >= 0) & observed.present[:, :, None] & within
        return index, there & there[:, observed.source, None] & ~observed.is_source[:, None]
