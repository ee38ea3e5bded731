"""The MLC loss (arXiv 2602.16660) by Gram matrix and eigenvalues in float64, with the gradient written out.

With unit rows z_i = r_i / n_i, G = Z Z^T = U diag(s^2) U^T, p = softmax(s / (temperature s_1)) and
g = (p - e_1) / (temperature s_1)::

    M = U diag(g / s) U^T
    dL/dr_i = (1 / n_i) [ sum_j M_ij z_j - (M G)_ii z_i ]

The forward pass finds the L x L matrix of the bracket; the backward pass is one batched product with the
rows. Everything is float64: near rank one, which is where training goes, a float32 Gram matrix (or the
bracket rounded to float32) has no correct digit of the gradient left.

Nothing here waits for the device, except ``torch.linalg.eigh`` itself: on a GPU it reads its error code on
the host, once per call, and PyTorch has no variant that does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prompt_losses(
    representations: Tensor, mask: Tensor, temperature: float, divide_by_top: bool
) -> tuple[Tensor, Tensor]:
    """(B,) loss of each prompt, and whether it has the two rows it takes to count."""
    if torch.is_grad_enabled() and representations.requires_grad:
        losses, counted = _PromptLosses.apply(representations, mask, temperature, divide_by_top)  # type: ignore[no-untyped-call]
        return losses, counted
    gram, inverse_norms = _gram(representations, mask)
    losses, counted, _, _ = _losses(gram, inverse_norms, representations.shape[2], temperature, divide_by_top)
    return losses.to(_out_dtype(representations)), counted


def values(representations: Tensor, mask: Tensor) -> Tensor:
    """(B, L) singular values of the unit rows, descending, zeros at the end."""
    eigenvalues, _, count = _eigen(*_gram(representations, mask))
    # The eigenvalues past the rank are rounding of 0, whose square root would be a visible 1e-8.
    past_the_rank = _positions(eigenvalues) >= count.clamp(max=representations.shape[2])[:, None]
    return eigenvalues.clamp(min=0).sqrt().masked_fill(past_the_rank, 0.0).to(_out_dtype(representations))


class _PromptLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, representations: Tensor, mask: Tensor, temperature: float, divide_by_top: bool
    ) -> tuple[Tensor, Tensor]:
        gram, inverse_norms = _gram(representations, mask)
        losses, counted, slopes, vectors = _losses(
            gram, inverse_norms, representations.shape[2], temperature, divide_by_top
        )
        outer = (vectors * slopes[:, None, :]) @ vectors.transpose(1, 2)  # M
        along = (outer * gram).sum(2)  # (M G)_ii: what would only change a row's length
        # A prompt that does not count has no gradient, whatever stands in it: its rows go as missing.
        inverse_norms = torch.where(counted[:, None], inverse_norms, 0.0)
        ctx.save_for_backward(representations, outer - torch.diag_embed(along), inverse_norms)
        ctx.mark_non_differentiable(counted)
        return losses.to(_out_dtype(representations)), counted

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _grad_counted: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            # autograd would differentiate what follows as if the bracket were constant: a wrong answer.
            raise RuntimeError("mlc_loss: double backward is not implemented; use backend='reference'")
        representations, bracket, inverse_norms = ctx.saved_tensors
        present = inverse_norms != 0
        rows = torch.where(present[:, :, None], representations, 0.0).double()
        # 1 / n_j and 1 / n_i are applied one after the other: their product may leave float64's range.
        gradient = (bracket * inverse_norms[:, None, :]) @ rows
        gradient *= (grad_losses.double()[:, None] * inverse_norms)[:, :, None]
        return torch.where(present[:, :, None], gradient, 0.0).to(representations.dtype), None, None, None


def _out_dtype(representations: Tensor) -> torch.dtype:
    return torch.float64 if representations.dtype == torch.float64 else torch.float32


def _gram(representations: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, L) Gram matrix of the unit rows, 0 where missing; (B, L) 1 / length, 0 where missing."""
    # `where`, not a product: a missing row may hold NaN.
    rows = torch.where(mask[:, :, None], representations, 0.0).double()
    largest: Tensor | None = None
    if representations.dtype == torch.float64:
        # Squares of float64 may over- or underflow; those of narrower dtypes cannot.
        largest = rows.abs().amax(2, keepdim=True)
        rows = rows / torch.where(largest != 0, largest, 1.0)
    products = rows @ rows.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    # A row with an infinity has no direction. Its inverse length 0 would pass for a missing row.
    squares = squares.masked_fill(squares.isinf(), float("nan"))
    present = squares != 0  # also true for NaN, which must reach the loss and not vanish
    inverse = torch.where(present, torch.where(present, squares, 1.0).rsqrt(), 0.0)
    gram = products * inverse[:, :, None] * inverse[:, None, :]
    if largest is not None:
        inverse = torch.where(present, inverse / torch.where(present, largest[:, :, 0], 1.0), 0.0)
    return gram, inverse


def _eigen(gram: Tensor, inverse_norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (B, L) descending, eigenvectors as columns (B, L, L), and (B,) number of rows.

    LAPACK refuses a matrix with NaN, and with it the whole batch. Here only the prompt's own values are NaN.
    """
    present = inverse_norms != 0
    finite = gram.isfinite().all(2).all(1)
    # A missing row is a zero row and column. -1 on its diagonal keeps it apart from the others and sorts
    # it behind every true eigenvalue.
    gram = torch.where(finite[:, None, None], gram - torch.diag_embed((~present).double()), 0.0)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = torch.where(finite[:, None], eigenvalues, float("nan"))
    return eigenvalues.flip(1), vectors.flip(2), present.sum(1)


def _positions(values: Tensor) -> Tensor:
    """(L,) 0, 1, 2, ... for (B, L) values."""
    return torch.arange(values.shape[1], device=values.device)


def _losses(
    gram: Tensor, inverse_norms: Tensor, features: int, temperature: float, divide_by_top: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) losses, (B,) whether they count, (B, L) g_i / s_i, and (B, L, L) U."""
    batch, languages = inverse_norms.shape
    if languages == 0:
        nothing = gram.new_zeros(batch)
        return nothing, nothing.bool(), inverse_norms, gram
    eigenvalues, vectors, count = _eigen(gram, inverse_norms)
    values = eigenvalues.clamp(min=0).sqrt()
    counted = count >= 2
    top = torch.where(counted, values[:, 0], 1.0)[:, None]
    unit_of_logits = temperature * top if divide_by_top else torch.full_like(top, temperature)
    logits = values / unit_of_logits
    positions = _positions(values)
    taken = positions < count.clamp(max=features)[:, None]
    logits = torch.where(taken | (positions == 0), logits, float("-inf"))
    log_total = logits.logsumexp(1)
    losses = torch.where(counted, log_total - logits[:, 0], 0.0)
    slopes = ((logits - log_total[:, None]).exp() - (positions == 0).double()) / unit_of_logits
    # Below this a singular value is rounding of 0, which has no gradient: take the zero subgradient.
    floor = (languages * torch.finfo(torch.float64).eps) ** 0.5 * top
    usable = ~(values <= floor) & counted[:, None]  # NaN stays, and makes the gradient NaN as the loss is
    slopes = torch.where(usable, slopes / torch.where(usable, values, 1.0), 0.0)
    return losses, counted, slopes, vectors
