"""The batch of a training step: token rows that carry their example and language.

:class:`~lightning_mlc.data.datamodule.MultilingualData` makes the tensors on the CPU; :meth:`Batch.to` moves them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mlc.data.rows import TokenRows


@dataclass
class Normalizers:
    """Divisors of a micro-batch's sums. They make the gradient independent of how a step is cut into micro-batches.

    Each is the total over the whole optimizer step (all micro-batches of all processes), divided by the number of
    micro-batches that are averaged afterwards (``accumulate_grad_batches`` by Lightning, the processes by DDP). They
    are known in advance, because an epoch is planned before it starts.
    """

    examples: float
    """Number of examples; preference losses are means over them."""
    response_tokens: float
    """Number of tokens of the chosen responses; token-mean losses are means over them."""
    groups: float
    """Number of examples with a prompt in two or more languages; consistency losses are means over them."""
    chosen: float
    """Number of chosen (desirable, or only) responses."""
    rejected: float
    """Number of rejected (undesirable) responses."""
    ordinary_groups: float = 0.0
    """Number of those among ``groups`` that are ordinary prompts."""

    @property
    def responses(self) -> float:
        """Number of responses; losses of single responses are means over them."""
        return self.chosen + self.rejected


@dataclass  # not frozen: Lightning walks over a batch's tensors, and refuses frozen dataclasses
class Batch:
    """B examples as token rows."""

    ids: tuple[str, ...]
    """The examples' ids as the file gives them (or ``file:row``); safe to print, unlike their text."""
    keys: Tensor
    """(B,) int64, number of each example in its dataset; the same under any sampler."""
    languages: tuple[str, ...]
    """BCP-47 codes that ``language`` indexes."""
    source: int
    """Index of the source language in ``languages``."""
    responses: tuple[TokenRows, ...]
    """Rows that end with a response: in training in the source language, in validation in all languages."""
    prompts: tuple[TokenRows, ...]
    """Rows without a response that is scored: in training the translations, in prediction all languages. They may end
    with the beginning of the source language's response, where its first positions are compared."""
    normalizers: Normalizers
    translations: tuple[TokenRows, ...] = ()
    """Rows of the other languages with responses, in training with terms that compare these. ``prompts`` then has only
    rows whose first positions are compared, for languages with responses of their own."""
    mismatched: tuple[TokenRows, ...] = ()
    """Rows in the source language that end with a response to another prompt. They are scored, without a gradient."""
    is_ordinary: Tensor | None = None
    """(B,) bool, whether the prompt is an ordinary one; None: none is."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``. Only copies from page-locked memory can be ``non_blocking``."""
        return dataclasses.replace(
            self,
            keys=self.keys.to(device, non_blocking=non_blocking),
            responses=tuple(rows.to(device, non_blocking) for rows in self.responses),
            prompts=tuple(rows.to(device, non_blocking) for rows in self.prompts),
            translations=tuple(rows.to(device, non_blocking) for rows in self.translations),
            mismatched=tuple(rows.to(device, non_blocking) for rows in self.mismatched),
            is_ordinary=None if self.is_ordinary is None else self.is_ordinary.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return dataclasses.replace(
            self,
            keys=self.keys.pin_memory(),
            responses=tuple(rows.pin_memory() for rows in self.responses),
            prompts=tuple(rows.pin_memory() for rows in self.prompts),
            translations=tuple(rows.pin_memory() for rows in self.translations),
            mismatched=tuple(rows.pin_memory() for rows in self.mismatched),
            is_ordinary=None if self.is_ordinary is None else self.is_ordinary.pin_memory(),
        )

    def without_translations(self) -> Batch:
        """The batch for a step on which no translation is run."""
        return dataclasses.replace(self, prompts=(), translations=())
