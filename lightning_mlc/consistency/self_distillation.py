"""Self-distillation from the source language into its translations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.consistency.divergence import divergences
from lightning_mlc.models.next_tokens import NextTokens


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

    With ``teacher: reference``, ``p_sk`` is the distribution of the reference, which does not change, and ``t`` is each
    language, the source language included. So the source language cannot move towards its translations: all of them
    are taught the same as at first.

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
        teacher: Whose distributions after the source prompt are taught: ``policy`` is the model as it is in this step,
            ``reference`` the reference model. ``reference`` teaches the source language, too.
    """

    name: ClassVar[str] = "self_distillation"

    weight: float = 0.0
    positions: int = 8
    teacher: Literal["policy", "reference"] = "policy"

    def __post_init__(self) -> None:
        self.check("weight", least=0)
        self.check("positions", least=1)

    @property
    def needs(self) -> Needs:
        if self.teacher == "reference":
            return Needs(reference=True, positions=self.positions, reference_source_positions=self.positions)
        return Needs(positions=self.positions)

    def losses(self, observed: Observed) -> Tensor:
        ours, theirs = self._student_and_teacher(observed)
        pairs = self._pairs(observed)
        # Which row of the teacher's logits teaches each row. A row without a teacher is in no pair, and its loss is not
        # used.
        taught_by = theirs.table[:, observed.source, None].expand_as(pairs).clamp(min=0).flatten()
        nothing = taught_by.new_zeros(1)
        each = divergences(theirs.logits, torch.cat([taught_by, nothing]).index_select(0, ours.cell), ours.logits)
        losses = torch.where(pairs, ours.spread(each), 0.0).sum((1, 2))
        return losses / pairs.sum((1, 2)).clamp(min=1)

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """Return ``agreement``: the share of a prompt's translations whose likeliest first token is the teacher's."""
        ours, theirs = self._student_and_teacher(observed)
        found = ours.logits.detach().argmax(1)[ours.table[:, :, 0].clamp(min=0)]
        wanted = theirs.logits.detach().argmax(1)[theirs.table[:, observed.source, 0].clamp(min=0)]
        compared = self._pairs(observed)[:, :, 0] & ~observed.is_source
        return {"agreement": ((found == wanted[:, None]) & compared).sum(1) / compared.sum(1).clamp(min=1)}

    def _student_and_teacher(self, observed: Observed) -> tuple[NextTokens, NextTokens]:
        """Next tokens of the policy in all languages, and those that have the teacher's after the source prompt."""
        grid = observed.policy if self.teacher == "policy" else observed.reference
        assert observed.policy.next_tokens is not None
        assert grid is not None
        assert grid.next_tokens is not None
        return observed.policy.next_tokens, grid.next_tokens

    def _pairs(self, observed: Observed) -> Tensor:
        """(B, L, K) bool: whether a teacher teaches the language at the position."""
        ours, theirs = self._student_and_teacher(observed)
        table = ours.table
        within = torch.arange(table.shape[2], device=table.device) < self.positions
        there = (table >= 0) & (observed.present & observed.is_group[:, None])[:, :, None] & within
        taught = there & (there[:, observed.source] & (theirs.table[:, observed.source] >= 0))[:, None]
        return taught & ~observed.is_source[:, None] if self.teacher == "policy" else taught
