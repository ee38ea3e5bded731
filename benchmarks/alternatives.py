"""The MLC loss as a user could write it in eager PyTorch, to compare the operator with.

All variants are written to be fast: no mask, no checks, one mean over prompts. ``rows`` are (B, L, D).
"""

from __future__ import annotations

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.2


def svd(rows: Tensor) -> Tensor:
    """The published form (https://github.com/Yuyan-B/MLC): a full float32 SVD, of which only the values are used."""
    unit = F.normalize(rows.float(), dim=2)
    _, values, _ = torch.linalg.svd(unit, full_matrices=False)
    return _loss(values)


def svd_gesvda(rows: Tensor) -> Tensor:
    """The published form with cuSOLVER's batched driver for tall matrices. CUDA only."""
    unit = F.normalize(rows.float(), dim=2)
    _, values, _ = torch.linalg.svd(unit.mT, full_matrices=False, driver="gesvda")
    return _loss(values)


def gram_eigh(rows: Tensor) -> Tensor:
    """Eigenvalues of the L x L Gram matrix in float64, with autograd through them."""
    unit = F.normalize(rows.double(), dim=2)
    values = torch.linalg.eigvalsh(unit @ unit.mT).flip(1).clamp(min=1e-15).sqrt()
    return _loss(values).float()


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, H) masked mean of (N, T, H) token states, summed in float32, as it is usually written."""
    kept = attention_mask[:, :, None]
    return (hidden.float() * kept).sum(1) / kept.sum(1)


def _loss(values: Tensor) -> Tensor:
    logits = values / (values[:, :1].detach() * TEMPERATURE)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


# Without this the backward pass could not run more than once, and so could not be timed alone.
torch._functorch.config.donated_buffer = False
gram_eigh_compiled = torch.compile(gram_eigh, dynamic=True)
"""``gram_eigh`` compiled by torch.compile, once for all shapes. The eigen-solver stays a library call."""
