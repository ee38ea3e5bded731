"""What a training step receives: token rows that know where they belong.

Tensors are made on the CPU by :class:`~lightning_mlc.data.datamodule.MultilingualData` and moved as a
whole with :meth:`Batch.to`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mlc.data.rows import TokenRows


@dataclass
class Normalizers:
    """What a micro-batch's sums are divided by, so that no way of cutting a batch changes the gradient.

    Each is the total over the whole optimizer step (all micro-batches of all processes), divided by
    the number of micro-batches that are averaged afterwards (``accumulate_grad_batches`` by Lightning,
    the processes by DDP). They are known in advance, because the plan of an epoch is.
    """

    examples: float
    """Examples; what a preference loss is averaged over."""
    response_tokens: float
    """Tokens of the chosen responses; what a token-mean loss is averaged over."""
    groups: float
    """Examples with a prompt in two or more languages; what the consistency losses are averaged over."""
    chosen: float
    """Chosen (desirable, or only) responses."""
    rejected: float
    """Rejected (undesirable) responses."""

    @property
    def responses(self) -> float:
        """Responses; what a loss is averaged over in which each counts for itself."""
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
    """Rows that end with a response. In training those of the source language; in validation of all."""
    prompts: tuple[TokenRows, ...]
    """Rows that are a prompt alone: in training the translations, in prediction every language."""
    normalizers: Normalizers
    translations: tuple[TokenRows, ...] = ()
    """Rows of the other languages with their responses, in training for terms that compare those; they are then
    not in ``prompts``."""
    mismatched: tuple[TokenRows, ...] = ()
    """Rows in the source language that end with a response to another prompt; scored, and never learned from."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``."""
        return dataclasses.replace(
            self,
            keys=self.keys.to(device, non_blocking=non_blocking),
            responses=tuple(rows.to(device, non_blocking) for rows in self.responses),
            prompts=tuple(rows.to(device, non_blocking) for rows in self.prompts),
            translations=tuple(rows.to(device, non_blocking) for rows in self.translations),
            mismatched=tuple(rows.to(device, non_blocking) for rows in self.mismatched),
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
        )

    def without_translations(self) -> Batch:
        """The batch for a step on which no translation is run."""
        return dataclasses.replace(self, prompts=(), translations=())
