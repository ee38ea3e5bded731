"""The Kullback-Leibler divergence between distributions over a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Largest number of logits in a chunk: 64 MiB in float32, or 110 positions for a vocabulary of 152,000. About six
tensors of this size are in memory at once."""


def divergences(teacher: Tensor, index: Tensor, student: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Compute ``KL(teacher || student) = sum over tokens of p (log p - log q)``, with a gradient for the student alone.

    A token whose probability under the teacher is 0 adds 0, whatever the student's logit. One that only the student
    rules out (a logit of minus infinity) makes the divergence infinite.

    For the backward pass, only the logits are kept, which exist anyway. Each chunk of positions is made float32 in
    turn, in both passes.

    Args:
        teacher: (Q, V) floating point: logits whose softmax is p. They get no gradient.
        index: (P,) int64: which of them teaches each student, from 0 to Q - 1.
        student: (P, V) floating point: logits whose softmax is q.
        chunk_elements: Largest number of logits in a chunk. A chunk has at least one position.

    Returns:
        (P,) divergences in float32; in float64 for float64 logits.
    """
    found: Tensor = _Divergence.apply(teacher.detach(), index, student, chunk_elements)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """Log-softmax of a chunk of both, and their divergence. The gradient is q - p."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, index: Tensor, student: Tensor, chunk_elements: int) -> Tensor:
        ctx.save_for_backward(teacher, index, student)
        ctx.chunk_elements = chunk_elements
        parts = []
        for chunk in _chunks(student, chunk_elements):
            wanted, found = _log_softmax(teacher[index[chunk]]), _log_softmax(student[chunk])
            p = wanted.exp()
            # Not p * (log p - log q) alone, which is NaN where p is 0 and log q is minus infinity.
            parts.append(torch.where(p > 0, p * (wanted - found), 0.0).sum(1))
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        teacher, index, student = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for chunk in _chunks(student, ctx.chunk_elements):
            part = _log_softmax(student[chunk]).exp_().sub_(_log_softmax(teacher[index[chunk]]).exp_())
            gradient[chunk] = part.mul_(grad[chunk, None]).to(student.dtype)
        return None, None, gradient, None


def _chunks(student: Tensor, chunk_elements: int) -> Iterator[slice]:
    size = max(1, chunk_elements // student.shape[1])
    return (slice(start, start + size) for start in range(0, max(1, len(student)), size))


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(1)
