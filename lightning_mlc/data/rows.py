"""Token sequences as the rows that a model runs: padded, or several packed into one.

A sequence is a prompt in one language, alone or with one response. Each sequence carries its example, language and
kind, so the model's outputs can be sorted whatever the rows look like.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

CHOSEN = 0
"""Sequence ends with the chosen response (or with the only response of an instruction example)."""
REJECTED = 1
"""Sequence ends with the rejected response."""
MISMATCHED = 2
"""Sequence ends with a response to another prompt."""
KINDS = 3
"""Number of kinds of responses above."""
NO_RESPONSE = -1
"""Sequence is a prompt alone."""
BEGINNING = -2
"""Sequence ends with the beginning of a response. It is run, but not scored."""


@dataclass(frozen=True)
class TokenSequence:
    """One sequence: a prompt with its generation header, then a response or nothing."""

    prompt: Sequence[int]
    response: Sequence[int]
    example: int
    """Index of the example in the batch."""
    language: int
    """Index into ``Batch.languages``."""
    kind: int
    """``CHOSEN``, ``REJECTED``, ``MISMATCHED``, ``NO_RESPONSE`` or ``BEGINNING``."""
    leads: bool = True
    """Whether the hidden state at the end of the prompt is taken from here: once per example and language."""
    positions: int = 0
    """Number of first positions of the response whose next-token distributions may be read here: at most one more than
    tokens of ``response``. Position 1 is the end of the prompt, which predicts the first token of the response."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


Piece = Sequence[TokenSequence]
"""Sequences with the same prompt. A packed row has the prompt once; each response sees it, and no other response."""


def length_of(piece: Piece) -> int:
    """Number of tokens of ``piece``."""
    return len(piece[0].prompt) + sum(len(row.response) for row in piece)


@dataclass
class Packing:
    """Which tokens of packed rows attend to which: a token sees its own segment up to itself, and its prompt."""

    segment: Tensor
    """(R, T) int64, number of the prompt or response that a token belongs to; -1 for padding."""
    prompt: Tensor
    """(R, T) int64, segment of the prompt that the token's sequence starts with; -1 for padding."""
    boundaries: Tensor
    """(P + 1,) int32, where in the flattened rows each piece starts, and where the last one ends."""
    longest: int
    """Number of tokens of the longest sequence."""


@dataclass
class TokenRows:
    """N sequences in R rows of T tokens."""

    input_ids: Tensor
    """(R, T) int64."""
    attention_mask: Tensor
    """(R, T) int64, 1 on tokens and 0 on padding."""
    position_ids: Tensor
    """(R, T) int64, place of each token in its sequence."""
    packing: Packing | None
    """Which tokens of packed rows attend to which; None where each row is one sequence."""
    prompt_end: Tensor
    """(N,) int64, where in the flattened rows (R * T) the last prompt token is: the end of the generation header."""
    example: Tensor
    """(N,) int64, index of the example in the batch."""
    language: Tensor
    """(N,) int64, index into ``Batch.languages``."""
    kind: Tensor
    """(N,) int64: ``CHOSEN``, ``REJECTED``, ``MISMATCHED``, ``NO_RESPONSE`` or ``BEGINNING``."""
    leads: Tensor
    """(N,) bool, whether the state at ``prompt_end`` counts."""
    response_tokens: Tensor
    """(N,) int64, number of response tokens that are scored."""
    response: Tensor
    """(M,) int64, where in the flattened rows the response tokens of all sequences are."""
    predictor: Tensor
    """(M,) int64, where the token before each of them is: the hidden state there predicts it."""
    response_cell: Tensor
    """(M,) int64, place of each in the flattened table (N, ``longest_response``) of response tokens."""
    longest_response: int
    """Number of tokens of the longest response that is scored; 0 where no sequence has one."""
    first: Tensor
    """(P,) int64, where in the flattened rows the first positions are (``TokenSequence.positions``): position 1 of all
    sequences that have it, then position 2 of those that have it, and so on."""
    first_sequence: Tensor
    """(P,) int64, index of the sequence of each of them, from 0 to N - 1."""
    first_position: Tensor
    """(P,) int64, number of the position, counted from 0."""
    first_counts: tuple[int, ...]
    """Number of sequences that have position 1, position 2, and so on. Their sum is P."""
    num_tokens: int
    """Number of tokens that are not padding."""

    @classmethod
    def pad(cls, rows: Sequence[TokenSequence], pad_id: int, side: Literal["left", "right"] = "right") -> TokenRows:
        """One sequence per row.

        Args:
            rows: N sequences.
            pad_id: Token id of padding.
            side: Side of the padding. Generation needs it on the left. Everything else has it on the right: recurrent
                models read padding on the left, and attention may be NaN in rows that are masked as a whole.
        """
        width = max(len(row) for row in rows)
        canvas = _Canvas(len(rows), width, pad_id)
        for index, row in enumerate(rows):
            canvas.write(index * width + (width - len(row) if side == "left" else 0), [row])
        return canvas.token_rows(packed=False)

    @classmethod
    def pack(cls, rows: Sequence[Sequence[Piece]], pad_id: int) -> TokenRows:
        """Several pieces per row, one after the other, with padding at the end."""
        width = max(sum(map(length_of, pieces)) for pieces in rows)
        canvas = _Canvas(len(rows), width, pad_id)
        for index, pieces in enumerate(rows):
            start = index * width
            for piece in pieces:
                canvas.write(start, piece)
                start += length_of(piece)
        return canvas.token_rows(packed=True)

    def __len__(self) -> int:
        return len(self.prompt_end)

    def num_first(self, positions: int) -> int:
        """Number of entries of ``first`` that are one of the first ``positions`` positions."""
        return sum(self.first_counts[:positions])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenRows:
        """The same rows on ``device``."""
        return _map(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenRows:
        """The same rows in page-locked memory."""
        return _map(self, lambda tensor: tensor.pin_memory())

    def sent_to(self, device: torch.device) -> TokenRows:
        """The same rows on ``device``, without waiting for the work that the device has to do first."""
        rows = self.pin_memory() if device.type == "cuda" else self
        return rows.to(device, non_blocking=device.type != "mps")  # there it is not safe


class _Canvas:
    """R empty rows of T tokens, onto which sequences are written."""

    def __init__(self, rows: int, width: int, pad_id: int) -> None:
        self.input_ids = torch.full((rows, width), pad_id, dtype=torch.int64)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.segment = torch.full_like(self.input_ids, -1)
        self.prompt = torch.full_like(self.input_ids, -1)
        self._segments = 0
        self._starts: list[int] = []
        self._rows: list[TokenSequence] = []
        self._prompt_end: list[int] = []
        self._response: list[int] = []
        self._predictor: list[int] = []
        self._first: list[tuple[int, int, int]] = []

    def write(self, start: int, piece: Piece) -> None:
        """Put ``piece`` at ``start`` of the flattened rows."""
        prompt = self._segments
        length = len(piece[0].prompt)
        self._starts.append(start)
        self._put(start, piece[0].prompt, 0, prompt)
        end = start + length
        for row in piece:
            self._put(end, row.response, length, prompt)
            self._prompt_end.append(start + length - 1)
            places = (start + length - 1, *range(end, end + len(row.response)))
            self._first += [(index, len(self._rows), places[index]) for index in range(row.positions)]
            self._rows.append(row)
            if row.response and row.kind != BEGINNING:
                self._response += places[1:]
                self._predictor += places[:-1]
            end += len(row.response)

    def _put(self, start: int, tokens: Sequence[int], position: int, prompt: int) -> None:
        place = slice(start, start + len(tokens))
        self.input_ids.view(-1)[place] = torch.tensor(tokens, dtype=torch.int64)
        self.position_ids.view(-1)[place] = torch.arange(position, position + len(tokens))
        self.segment.view(-1)[place] = self._segments
        self.prompt.view(-1)[place] = prompt
        self._segments += 1

    def token_rows(self, packed: bool) -> TokenRows:
        """The rows that were written."""
        rows = self._rows
        scored = [0 if row.kind == BEGINNING else len(row.response) for row in rows]
        tokens = torch.tensor(scored, dtype=torch.int64)
        longest_response = int(tokens.max())
        cells = torch.arange(longest_response).expand(len(rows), -1) < tokens[:, None]
        first = sorted(self._first)
        packing = None
        if packed:
            packing = Packing(
                segment=self.segment,
                prompt=self.prompt,
                boundaries=torch.tensor([*self._starts, self.input_ids.numel()], dtype=torch.int32),
                longest=max(map(len, rows)),
            )
        return TokenRows(
            input_ids=self.input_ids,
            attention_mask=(self.segment >= 0).long(),
            position_ids=self.position_ids,
            packing=packing,
            prompt_end=torch.tensor(self._prompt_end),
            example=torch.tensor([row.example for row in rows]),
            language=torch.tensor([row.language for row in rows]),
            kind=torch.tensor([row.kind for row in rows]),
            leads=torch.tensor([row.leads for row in rows]),
            response_tokens=tokens,
            response=torch.tensor(self._response, dtype=torch.int64),
            predictor=torch.tensor(self._predictor, dtype=torch.int64),
            response_cell=cells.flatten().nonzero().squeeze(1),
            longest_response=longest_response,
            first=torch.tensor([place for _, _, place in first], dtype=torch.int64),
            first_sequence=torch.tensor([sequence for _, sequence, _ in first], dtype=torch.int64),
            first_position=torch.tensor([index for index, _, _ in first], dtype=torch.int64),
            first_counts=tuple(Counter(index for index, _, _ in first).values()),
            num_tokens=int((self.segment >= 0).sum()),
        )


_Tensors = TypeVar("_Tensors", TokenRows, Packing)


def _map(tensors: _Tensors, function: Callable[[Tensor], Tensor]) -> _Tensors:
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(tensors):
        value = getattr(tensors, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = function(value)
        elif isinstance(value, Packing):
            changed[field.name] = _map(value, function)
    return dataclasses.replace(tensors, **changed)
