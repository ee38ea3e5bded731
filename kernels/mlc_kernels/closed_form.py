"""The MLC loss (arXiv 2602.16660) from the Gram matrix and its eigenvalues in float64, with an explicit gradient.

With unit rows z_i = r_i / n_i, G = Z Z^T = U diag(s^2) U^T, p = softmax(s / (temperature s_1)) and
g = (p - e_1) / (temperature s_1)::

    M = U diag(g / s) U^T
    dL/dr_i = (1 / n_i) [ sum_j M_ij z_j - (M G)_ii z_i ]

The forward pass computes the bracket as an L x L matrix; the backward pass is one batched product of it with the
rows. Everything is float64. Training moves the rows towards rank one, and there a float32 Gram matrix (or the
bracket rounded to float32) leaves no correct digit in the gradient.

Only ``torch.linalg.eigh`` waits for the device: on a GPU it reads its error code on the host, once per call, and
PyTorch has no variant that does not.

For a few prompts on a CPU, the number of calls costs more than the arithmetic: in addition to the products and the
eigenvalues there are about 70 operations on small matrices. The second implementation, ``_complete_losses``, has
half as many. It handles the usual batch: small, and without missing rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 19
"""On a CPU, rows are widened to float64 in blocks of this many elements. Such a block has 4 MiB: it stays in the cache,
and its memory is reused. The system would provide a larger allocation anew every time, page by page."""


def prompt_losses(
    representations: Tensor, mask: Tensor | None, temperature: float, divide_by_top: bool
) -> tuple[Tensor, Tensor | None]:
    """(B,) loss of each prompt, and (B,) whether the prompt counts: it needs two rows. None: all of them count."""
    differentiable = torch.is_grad_enabled() and representations.requires_grad
    if _may_be_complete(representations, mask):
        complete = _complete_losses(representations.detach(), temperature, divide_by_top, differentiable)
        if complete is not None:
            losses, bracket = complete
            if bracket is not None:
                losses = _WithBracket.apply(representations, losses, bracket)  # type: ignore[no-untyped-call]
            return losses, None
    if differentiable:
        losses, counted = _PromptLosses.apply(representations, mask, temperature, divide_by_top)  # type: ignore[no-untyped-call]
        return losses, counted
    gram, inverse_norms = _gram(representations, mask)
    losses, counted, _, _ = _losses(gram, inverse_norms, representations.shape[2], temperature, divide_by_top)
    return losses.to(_out_dtype(representations)), counted


def values(representations: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) singular values of the unit rows, in descending order, with zeros at the end."""
    eigenvalues, _, taken, _ = _eigen(*_gram(representations, mask), representations.shape[2])
    # The eigenvalues beyond the rank are 0 up to rounding. Their square roots would be about 1e-8.
    return eigenvalues.sqrt().masked_fill(~taken, 0.0).flip(1).to(_out_dtype(representations))


class _PromptLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, representations: Tensor, mask: Tensor | None, temperature: float, divide_by_top: bool
    ) -> tuple[Tensor, Tensor]:
        gram, inverse_norms = _gram(representations, mask)
        losses, counted, slopes, vectors = _losses(
            gram, inverse_norms, representations.shape[2], temperature, divide_by_top
        )
        bracket = (vectors * slopes[:, None, :]) @ vectors.transpose(1, 2)  # M
        # Subtract (M G)_ii from the diagonal: that part of the gradient would only change a row's length.
        bracket.diagonal(dim1=1, dim2=2).sub_((bracket * gram).sum(2))
        # A prompt that does not count has no gradient, whatever its rows hold: they are treated as missing.
        inverse_norms.masked_fill_(~counted[:, None], 0.0)
        ctx.save_for_backward(representations, bracket, inverse_norms)
        ctx.has_mask = mask is not None
        ctx.mark_non_differentiable(counted)
        # For float64, do not call `.to`, which would change nothing: torch.compile (2.11) would lose the gradient.
        narrow = _out_dtype(representations) == torch.float32
        return losses.float() if narrow else losses, counted

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _grad_counted: Tensor) -> tuple[Tensor, None, None, None]:
        _refuse_double_backward()
        representations, bracket, inverse_norms = ctx.saved_tensors
        missing = (inverse_norms == 0)[:, :, None]
        left = (grad_losses.double()[:, None] * inverse_norms)[:, :, None]
        bracket = bracket * inverse_norms[:, None, :]
        # Apply 1 / n_j and 1 / n_i one after the other: for float64 rows, their product may over- or underflow.
        scale_last = representations.dtype == torch.float64
        if not scale_last:
            bracket = bracket * left
        # Reading a value is free on a CPU, and in most steps there is no row to fill with zeros.
        fill = not _on_host(representations) or bool(missing.any())
        gradient = torch.empty_like(representations)
        step = _prompts_at_once(representations)
        blocks = (torch.split(x, step) for x in (representations, bracket, missing, left, gradient))
        for rows, matrix, absent, factor, out in zip(*blocks, strict=True):
            rows = rows.double()
            if fill and ctx.has_mask:  # a missing row of a prompt that counts may hold NaN
                rows = rows.masked_fill(absent, 0.0)
            found = matrix @ rows
            out.copy_(found.mul_(factor) if scale_last else found)
            if fill:
                out.masked_fill_(absent, 0.0)
        return gradient, None, None, None


def _may_be_complete(representations: Tensor, mask: Tensor | None) -> bool:
    """Whether to try ``_complete_losses``: the values are few and on the host, and no row is masked."""
    prompts, languages, features = representations.shape
    return (
        _on_host(representations)
        and representations.dtype != torch.float64  # its squares may over- or underflow
        and 2 <= languages <= features
        and 0 < prompts <= _prompts_at_once(representations)
        and (mask is None or bool(mask.all()))
    )


def _complete_losses(
    representations: Tensor, temperature: float, divide_by_top: bool, differentiable: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(B,) losses and, if ``differentiable``, (B, L, L) matrices; a matrix times the rows is the rows' gradient.

    Returns None if a row is zero or not finite: ``_losses`` handles such a batch.
    """
    languages = representations.shape[1]
    rows = representations.double()
    products = torch.bmm(rows, rows.mT)
    inverse_norms = products.diagonal(dim1=1, dim2=2).rsqrt()
    inverse_norms = inverse_norms[:, :, None] * inverse_norms[:, None, :]
    gram = products.mul_(inverse_norms)
    # A zero row gives 0 / 0, an infinity inf / inf. Only then is the sum of the cosines NaN.
    if math.isnan(gram.sum().item()):
        return None
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.clamp_(min=0).sqrt_()
    top = values[:, -1:]
    unit_of_logits = top * temperature if divide_by_top else temperature
    log_probabilities = torch.log_softmax(values / unit_of_logits, 1)
    losses = log_probabilities[:, -1].neg().to(_out_dtype(representations))
    if not differentiable:
        return losses, None
    slopes = log_probabilities.exp_()
    slopes[:, -1].sub_(1.0)
    slopes /= unit_of_logits * values.masked_fill_(values <= _relative_floor(languages) * top, math.inf)
    bracket = torch.bmm(vectors * slopes[:, None, :], vectors.mT)
    bracket.diagonal(dim1=1, dim2=2).sub_((bracket * gram).sum(2))
    return losses, bracket.mul_(inverse_norms)


class _WithBracket(torch.autograd.Function):
    """Connects losses that are already computed to the gradient of the rows."""

    @staticmethod
    def forward(ctx: Any, representations: Tensor, losses: Tensor, bracket: Tensor) -> Tensor:
        ctx.save_for_backward(representations, bracket)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        _refuse_double_backward()
        representations, bracket = ctx.saved_tensors
        gradient = torch.bmm(bracket * grad_losses[:, None, None], representations.double())
        return gradient.to(representations.dtype), None, None


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        # autograd would differentiate the backward pass as if the bracket were constant: a wrong answer.
        raise RuntimeError("mlc_loss: double backward is not implemented; use backend='reference'")


def _relative_floor(languages: int) -> float:
    """Singular values below this share of the largest are 0 up to rounding. They get the zero subgradient."""
    return math.sqrt(languages * torch.finfo(torch.float64).eps)


def _out_dtype(representations: Tensor) -> torch.dtype:
    return torch.float64 if representations.dtype == torch.float64 else torch.float32


def _on_host(tensor: Tensor) -> bool:
    """Whether reading values and splitting work cost nothing: on a CPU, outside of ``torch.compile``."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _prompts_at_once(representations: Tensor) -> int:
    """How many prompts' rows are widened to float64 together."""
    prompts, languages, features = representations.shape
    # torch.compile fuses the widening itself, and would compile again for every number of blocks.
    return max(1, _BLOCK // max(1, languages * features) if _on_host(representations) else prompts)


def _gram(representations: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, L, L) Gram matrix of the unit rows, and (B, L) inverse lengths; both are 0 where a row is missing."""
    step = _prompts_at_once(representations)
    blocks = torch.split(representations, step)
    masks = [None] * len(blocks) if mask is None else torch.split(mask, step)
    parts = [_gram_of_block(rows, present) for rows, present in zip(blocks, masks, strict=True)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([gram for gram, _ in parts]), torch.cat([inverse for _, inverse in parts])


def _gram_of_block(representations: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = representations.double()
    if mask is not None:
        rows = rows.masked_fill(~mask[:, :, None], 0.0)  # not a product: a missing row may hold NaN
    largest: Tensor | None = None
    if representations.dtype == torch.float64:
        # Squares of float64 values may over- or underflow; squares of narrower dtypes cannot.
        largest = rows.abs().amax(2, keepdim=True)
        rows = rows / torch.where(largest != 0, largest, 1.0)
    products = rows @ rows.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    inverse = squares.rsqrt()
    # A row with an infinity has no direction. Its inverse length would be 0, as for a missing row.
    inverse.masked_fill_(squares == float("inf"), float("nan"))
    missing = squares == 0  # False for NaN, which must reach the loss and not vanish
    inverse.masked_fill_(missing, 0.0)
    gram = products * inverse[:, :, None] * inverse[:, None, :]
    if largest is not None:
        inverse = (inverse / largest[:, :, 0]).masked_fill_(missing, 0.0)
    return gram, inverse


def _eigen(gram: Tensor, inverse_norms: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues (B, L) in ascending order, none negative; eigenvectors (B, L, L) as columns; (B, L) whether an
    eigenvalue belongs to the rows that exist; (B,) number of these rows.

    LAPACK refuses a whole batch if one matrix has NaN. Here only the values of that prompt become NaN.
    """
    missing = inverse_norms == 0
    total = gram.sum((1, 2))
    broken = total != total  # the entries are cosines, so the sum is either NaN or finite
    # A missing row is a zero row and column. With -1 on the diagonal its eigenvalue is -1, which comes before
    # every true eigenvalue.
    shifted = gram.masked_fill(broken[:, None, None], 0.0)
    shifted.diagonal(dim1=1, dim2=2).sub_(missing.double())
    eigenvalues, vectors = torch.linalg.eigh(shifted)
    eigenvalues = eigenvalues.clamp_(min=0).masked_fill_(broken[:, None], float("nan"))
    languages = gram.shape[1]
    count = languages - missing.sum(1)
    from_top = torch.arange(languages - 1, -1, -1, device=gram.device)
    return eigenvalues, vectors, from_top < count.clamp(max=features)[:, None], count


def _losses(
    gram: Tensor, inverse_norms: Tensor, features: int, temperature: float, divide_by_top: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) losses, (B,) whether they count, (B, L) g_i / s_i, and (B, L, L) U, in ascending order of eigenvalues."""
    batch, languages = inverse_norms.shape
    if languages == 0:
        nothing = gram.new_zeros(batch)
        return nothing, nothing.bool(), inverse_norms, gram
    eigenvalues, vectors, taken, count = _eigen(gram, inverse_norms, features)
    values = eigenvalues.sqrt()
    counted = count >= 2
    top = values[:, -1:].masked_fill(~counted[:, None], 1.0)
    unit_of_logits = temperature * top if divide_by_top else torch.full_like(top, temperature)
    # Softmax over the values of the rows that exist. A prompt that does not count has weights 0 / 1 = 0.
    weights = ((values - top) / unit_of_logits).exp().masked_fill_(~taken, 0.0)
    total = weights.sum(1, keepdim=True).masked_fill_(~counted[:, None], 1.0)
    losses = total[:, 0].log()
    slopes = weights / total
    slopes[:, -1] -= 1.0
    # NaN stays, so that the gradient is NaN where the loss is.
    unusable = (values <= _relative_floor(languages) * top) | ~counted[:, None]
    slopes = (slopes / (unit_of_logits * values)).masked_fill_(unusable, 0.0)
    return losses, counted, slopes, vectors
