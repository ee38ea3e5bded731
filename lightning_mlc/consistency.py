"""The multi-lingual consistency (MLC) term: what is added to the objective.

arXiv 2602.16660. The hidden states of a prompt in L languages pass through an extractor, and the matrix
of the resulting rows, each of unit length, is pulled towards rank one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_mlc.errors import UserError
from mlc_kernels import mlc_loss


@dataclass(frozen=True)
class MLC:
    """Settings of the consistency term. The defaults are the published ones where those are usable.

    Args:
        weight: What the MLC loss is multiplied by; 0 turns it off, and no translation is run.
        temperature: Temperature of the softmax over singular values.
        scale: ``top`` divides the singular values by the largest one, as the authors' code does; ``none``
            does not, as in the paper's equation.
        layer: Whose hidden states: an integer index (0 embeddings, -1 after the last layer and the final
            norm) or a fraction of the depth (0.5: the middle).
        extractor: ``linear`` trains a linear map of the hidden states, ``frozen`` keeps that map as
            initialised, ``none`` compares the hidden states themselves.
        extractor_dim: Output width of the extractor.
        extractor_bias: Whether the extractor has a bias.
        extractor_lr: Learning rate of the extractor; null for that of the model. At the model's rate, 6e-7
            in the published recipe, an extractor hardly moves; at a large one it alone can satisfy the loss
            while the model stays as it was.
        center: Subtract a running mean of the hidden states before the extractor. Hidden states share a
            large common direction that makes them look consistent from the start.
        every_n_steps: Add the term on every n-th optimizer step; the other steps run no translation.
    """

    weight: float = 0.8
    temperature: float = 0.2
    scale: Literal["top", "none"] = "top"
    layer: int | float = -1
    extractor: Literal["linear", "frozen", "none"] = "linear"
    extractor_dim: int = 512
    extractor_bias: bool = True
    extractor_lr: float | None = None
    center: bool = False
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"model.mlc.weight: must be 0 (off) or above, got {self.weight}")
        if not 0.01 <= self.temperature <= 100:
            raise UserError(f"model.mlc.temperature: must be from 0.01 to 100, got {self.temperature}")
        if self.extractor_dim < 2:
            raise UserError(f"model.mlc.extractor_dim: must be at least 2, got {self.extractor_dim}")
        if self.extractor_lr is not None and self.extractor != "linear":
            raise UserError(
                f"model.mlc.extractor_lr: an extractor that is '{self.extractor}' is not trained; "
                "remove it or set model.mlc.extractor to linear"
            )
        if self.extractor_lr is not None and not self.extractor_lr >= 0:
            raise UserError(f"model.mlc.extractor_lr: must not be negative, got {self.extractor_lr}")
        if self.every_n_steps < 1:
            raise UserError(f"model.mlc.every_n_steps: must be at least 1, got {self.every_n_steps}")

    def is_on(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 0) has the term."""
        return self.weight > 0 and step % self.every_n_steps == 0


class Consistency(nn.Module):
    """Extractor and MLC loss over hidden states (B, L, H) of B prompts in L languages.

    Everything here runs in the extractor's dtype (float32 unless the whole model is in half precision)
    outside of autocast: near rank one, which is where training goes, rounding would swamp the signal.
    """

    MEAN_DECAY = 0.9
    """How much of the running mean an optimizer step keeps."""

    mean: Tensor
    """(H,) running mean of the hidden states, 0 until a first step has ended."""
    steps_seen: Tensor
    """() number of optimizer steps in the running mean."""

    def __init__(self, settings: MLC, hidden_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.extractor: nn.Module = nn.Identity()
        if settings.extractor != "none":
            self.extractor = nn.Linear(hidden_size, settings.extractor_dim, bias=settings.extractor_bias)
            self.extractor.requires_grad_(settings.extractor == "linear")
        if settings.center:
            self.register_buffer("mean", torch.zeros(hidden_size))
            self.register_buffer("steps_seen", torch.zeros(()))
            self.register_buffer("_window_sum", torch.zeros(hidden_size), persistent=False)
            self.register_buffer("_window_rows", torch.zeros(()), persistent=False)

    _window_sum: Tensor
    _window_rows: Tensor

    def extract(self, states: Tensor) -> Tensor:
        """Representations (B, L, D) of hidden ``states`` (B, L, H)."""
        with torch.autocast(device_type=states.device.type, enabled=False):
            parameter = next(self.extractor.parameters(), None)
            states = states.to(parameter.dtype) if parameter is not None else states.float()
            if self.settings.center:
                states = states - self.mean
            extracted: Tensor = self.extractor(states)
            return extracted

    def loss(self, representations: Tensor, mask: Tensor) -> Tensor:
        """(B,) MLC loss of each prompt, 0 where fewer than two languages are present."""
        return mlc_loss(
            representations,
            mask,
            temperature=self.settings.temperature,
            scale=self.settings.scale,
            reduction="none",
        )

    @torch.no_grad()
    def observe(self, states: Tensor, mask: Tensor) -> None:
        """Count the states of a micro-batch towards the running mean.

        The mean itself changes only at the end of an optimizer step (:meth:`fold_mean`), so that the way
        a batch is cut into micro-batches changes nothing.
        """
        if self.settings.center:
            self._window_sum += (states.to(self._window_sum.dtype) * mask[:, :, None]).sum((0, 1))
            self._window_rows += mask.sum()

    @torch.no_grad()
    def fold_mean(self) -> None:
        """Fold what was observed since the last call, on all processes, into the running mean."""
        if not self.settings.center:
            return
        totals = torch.cat([self._window_sum, self._window_rows[None]])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        seen = totals[-1] > 0
        window_mean = totals[:-1] / totals[-1].clamp(min=1)
        # The first window is taken as it is; later ones move the mean by their share.
        keep = torch.where(self.steps_seen > 0, self.MEAN_DECAY, 0.0)
        self.mean.copy_(torch.where(seen, keep * self.mean + (1 - keep) * window_mean, self.mean))
        self.steps_seen += seen
        self._window_sum.zero_()
        self._window_rows.zero_()
