"""What a training step receives: token rows that know where they belong.

Rows carry the index of their example and of their language, so that nothing downstream regroups them
by position. Tensors are made on the CPU by :class:`~lightning_mlc.data.datamodule.MultilingualData`
and moved as a whole with :meth:`Batch.to`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

CHOSEN = 0
"""Row ends with the chosen response (or with the only response of an instruction example)."""
REJECTED = 1
"""Row ends with the rejected response."""
NO_RESPONSE = -1
"""Row is a prompt alone."""


@dataclass(frozen=True)
class Row:
    """One token sequence before padding: a prompt with its generation header, then maybe a response."""

    prompt: Sequence[int]
    response: Sequence[int]
    example: int
    """Index of the example in the batch."""
    language: int
    """Index into ``Batch.languages``."""
    kind: int
    """``CHOSEN``, ``REJECTED`` or ``NO_RESPONSE``."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class TokenRows:
    """N padded token sequences of length T."""

    input_ids: Tensor
    """(N, T) int64."""
    attention_mask: Tensor
    """(N, T) int64, 1 on tokens and 0 on padding."""
    prompt_end: Tensor
    """(N,) int64, position in the padded row of the last prompt token (end of the generation header)."""
    example: Tensor
    """(N,) int64, index of the example in the batch."""
    language: Tensor
    """(N,) int64, index into ``Batch.languages``."""
    kind: Tensor
    """(N,) int64: ``CHOSEN``, ``REJECTED`` or ``NO_RESPONSE``."""
    response: Tensor
    """(M,) int64, where the response tokens of all rows lie in the flattened (N * T) ``input_ids``."""
    logits_to_keep: int
    """Logits are needed only at the last so many positions (0: nowhere)."""
    num_tokens: int = -1
    """Tokens that are not padding. Counted when rows are made, on the CPU: later, it would wait for the device."""

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            self.num_tokens = int(self.attention_mask.sum())

    @classmethod
    def pad(cls, rows: Sequence[Row], pad_id: int, side: Literal["left", "right"] = "left") -> TokenRows:
        """Stack ``rows``. Left padding aligns the responses, so that logits are kept only where they lie."""
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        ends = []
        response: list[int] = []
        first_logit = length
        for i, row in enumerate(rows):
            start = length - len(row) if side == "left" else 0
            ids[i, start : start + len(row)] = torch.tensor([*row.prompt, *row.response], dtype=torch.int64)
            mask[i, start : start + len(row)] = 1
            ends.append(start + len(row.prompt) - 1)
            if row.response:
                first_logit = min(first_logit, ends[-1])
                response += range(i * length + ends[-1] + 1, i * length + start + len(row))
        return cls(
            input_ids=ids,
            attention_mask=mask,
            prompt_end=torch.tensor(ends, dtype=torch.int64),
            example=torch.tensor([row.example for row in rows], dtype=torch.int64),
            language=torch.tensor([row.language for row in rows], dtype=torch.int64),
            kind=torch.tensor([row.kind for row in rows], dtype=torch.int64),
            response=torch.tensor(response, dtype=torch.int64),
            logits_to_keep=length - first_logit,
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenRows:
        """The same rows on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenRows:
        """The same rows in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenRows:
        tensors: dict[str, Any] = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


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
    """Examples with a prompt in two or more languages; what the consistency loss is averaged over."""


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

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``."""
        return dataclasses.replace(
            self,
            keys=self.keys.to(device, non_blocking=non_blocking),
            responses=tuple(rows.to(device, non_blocking) for rows in self.responses),
            prompts=tuple(rows.to(device, non_blocking) for rows in self.prompts),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return dataclasses.replace(
            self,
            keys=self.keys.pin_memory(),
            responses=tuple(rows.pin_memory() for rows in self.responses),
            prompts=tuple(rows.pin_memory() for rows in self.prompts),
        )

    def without_prompts(self) -> Batch:
        """The batch for a step on which no translation is run."""
        return dataclasses.replace(self, prompts=())


def pad_in_chunks(
    rows: Sequence[Row], pad_id: int, max_waste: float = 0.25, max_tokens: int | None = None
) -> tuple[TokenRows, ...]:
    """``rows`` as a few padded blocks of similar length, shortest first.

    Languages differ in length by a factor of five and more, so one block would be mostly padding. A new
    block begins where padding would exceed the share ``max_waste`` of a block, or a block ``max_tokens``.
    """
    blocks: list[list[Row]] = []
    tokens = 0
    for row in sorted(rows, key=len):
        if blocks:
            padded = (len(blocks[-1]) + 1) * len(row)
            if (1 - max_waste) * padded <= tokens + len(row) and (max_tokens is None or padded <= max_tokens):
                blocks[-1].append(row)
                tokens += len(row)
                continue
        blocks.append([row])
        tokens = len(row)
    return tuple(TokenRows.pad(block, pad_id) for block in blocks)
