"""Self-distillation from the source language into its translations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

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
        compared = self._compared(observed)
        ours, pairs = compared.student, compared.pairs
        # Which row of the teacher's logits teaches each row. A row without a teacher is in no pair, and its loss is not
        # used.
        taught_by = compared.taught_by[:, None].expand_as(pairs).clamp(min=0).flatten()
        nothing = taught_by.new_zeros(1)
        index = torch.cat([taught_by, nothing]).index_select(0, ours.cell)
        each = divergences(compared.teacher.logits, index, ours.logits)
        losses = torch.where(pairs, ours.spread(each), 0.0).sum((1, 2))
        return losses / pairs.sum((1, 2)).clamp(min=1)

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """Return ``agreement``: the share of a prompt's translations whose likeliest first token is the teacher's."""
        compared = self._compared(observed)
        found = compared.student.logits.detach().argmax(1)[compared.table[:, :, 0].clamp(min=0)]
        wanted = compared.teacher.logits.detach().argmax(1)[compared.taught_by[:, 0].clamp(min=0)]
        translations = compared.pairs[:, :, 0] & ~observed.is_source
        return {"agreement": ((found == wanted[:, None]) & translations).sum(1) / translations.sum(1).clamp(min=1)}

    def _compared(self, observed: Observed) -> _Compared:
        student = observed.policy.next_tokens
        assert student is not None
        table = student.table
        teacher, taught_by = student, table[:, observed.source]
        if self.teacher == "reference":
            assert observed.reference is not None
            assert observed.reference.next_tokens is not None
            teacher = observed.reference.next_tokens
            taught_by = teacher.table[:, observed.source]
        within = torch.arange(table.shape[2], device=table.device) < self.positions
        there = (table >= 0) & (observed.present & observed.is_group[:, None])[:, :, None] & within
        pairs = there & (there[:, observed.source] & (taught_by >= 0))[:, None]
        if self.teacher == "policy":
            pairs = pairs & ~observed.is_source[:, None]
        return _Compared(student, teacher, table, taught_by, pairs)


class _Compared(NamedTuple):
    """Student and teacher for B prompts in L languages, at K positions."""

    student: NextTokens
    """Of the policy, in all languages."""
    teacher: NextTokens
    """They have the teacher's after the source prompt."""
    table: Tensor
    """(B, L, K) int64: rows of the student's logits; -1 where there is none."""
    taught_by: Tensor
    """(B, K) int64: rows of the teacher's logits; -1 where there is none."""
    pairs: Tensor
    """(B, L, K) bool: whether the teacher teaches the language at the position."""
