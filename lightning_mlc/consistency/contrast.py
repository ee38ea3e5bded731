"""A contrast between different prompts, so that they do not become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.consistency.measures import unit_rows


@dataclass(frozen=True)
class Contrast(ConsistencyTerm):
    """InfoNCE over prompts and languages: which of the micro-batch's prompts is this one's translation?

    The loss of prompt i is the mean over each two different languages a and b that it exists in, in both orders, of

        -log( exp(cos(r_ia, r_ib) / temperature) / sum over j of exp(cos(r_ia, r_jb) / temperature) )

    where

    - ``r_ia`` (D,) is the representation of prompt i in language a,
    - j is each prompt of the micro-batch that exists in language b, i included.

    It is the cross-entropy of finding a prompt's translation among n prompts: ``log n`` if all of them have one state,
    and near 0 if each translation is closer to its own prompt than to all others. All candidates are in one language,
    so a direction that a language's states share does not help to tell them apart.

    The ancestor of the MLC loss, Principled Multimodal Representation Learning (arXiv 2507.17343), has a regularisation
    with the same purpose: the cross-entropy of finding the leading singular vector of a prompt's representations among
    those of the batch. A singular vector has no sign, and no stable gradient where the two largest singular values are
    close. So this term compares the representations themselves, which also pulls translations together.

    A prompt is compared with those of its micro-batch and process only. Unlike those of the other terms, the gradient
    depends on how a step is cut. A micro-batch with one prompt has nothing to compare: its loss is 0.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term compares: ``all``, those of kind ``ordinary``, or the others (``harmful``).
        temperature: Temperature of the softmax over prompts, from 0.01 to 100. A small one looks at the most similar
            prompts only.
    """

    name: ClassVar[str] = "contrast"
    compares_prompts: ClassVar[bool] = True

    weight: float = 0.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        self.check("weight", least=0)
        self.check("temperature", least=0.01, most=100)

    @property
    def needs(self) -> Needs:
        return Needs(representations=True)

    def losses(self, observed: Observed) -> Tensor:
        rows = observed.representations
        assert rows is not None
        cosines, usable = _cosines(observed)
        # A language without this prompt has no row to look from, and may have no candidate. It is masked below.
        logits = (cosines / self.temperature).masked_fill(~usable.T[None, None], float("-inf"))
        logits = torch.where(usable.T.any(1)[:, None], logits, 0.0)
        own = logits.log_softmax(3).diagonal(dim1=0, dim2=3)  # (L, L, B)
        pairs = _pairs(usable)
        losses = -torch.where(pairs, own.permute(2, 0, 1), 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
        return losses.to(torch.promote_types(rows.dtype, torch.float32))

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """Return ``found``: how often the translation is the closest of the candidates, and ``chance``, which expects
        1 / n of n candidates. A tie counts as one over the number of the closest ones."""
        cosines, usable = _cosines(observed)
        cosines = cosines.detach().masked_fill(~usable.T[None, None], float("-inf"))
        closest = cosines.amax(3)
        ties = (cosines == closest[..., None]).sum(3).clamp(min=1).to(cosines.dtype)
        found = (cosines.diagonal(dim1=0, dim2=3).permute(2, 0, 1) == closest) / ties
        chance = 1 / usable.sum(0).clamp(min=1).to(cosines.dtype)  # (L,), by the language of the candidates
        pairs = _pairs(usable)
        count = pairs.sum((1, 2)).clamp(min=1)
        return {
            "found": torch.where(pairs, found, 0.0).sum((1, 2)) / count,
            "chance": torch.where(pairs, chance, 0.0).sum((1, 2)) / count,
        }


def _cosines(observed: Observed) -> tuple[Tensor, Tensor]:
    """Return (B, L, L, B) cosines of prompt i in language a and prompt j in language b; (B, L) bool: usable rows."""
    assert observed.representations is not None
    # In float64: if all prompts are nearly one, their cosines differ in the last digits.
    unit, usable = unit_rows(observed.representations, observed.present)
    return torch.einsum("iad,jbd->iabj", unit, unit), usable


def _pairs(usable: Tensor) -> Tensor:
    """(B, L, L) bool: each two different languages that the prompt exists in, in both orders."""
    both = usable[:, :, None] & usable[:, None, :]
    return both & ~torch.eye(usable.shape[1], dtype=torch.bool, device=usable.device)
