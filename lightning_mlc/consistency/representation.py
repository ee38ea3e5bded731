"""What of the hidden states is compared: extractor and centring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mlc.consistency.settings import Consistency


class Representation(nn.Module):
    """From hidden states (B, L, H) of B prompts in L languages to what the terms compare.

    Everything here runs in the extractor's dtype (float32 unless the whole model is in half precision)
    outside of autocast: near rank one, which is where training goes, rounding would swamp the signal.
    """

    MEAN_DECAY = 0.9
    """How much of the running mean an optimizer step keeps."""

    mean: Tensor
    """(H,) running mean of the hidden states, 0 until a first step has ended."""
    steps_seen: Tensor
    """() number of optimizer steps in the running mean."""

    def __init__(self, settings: Consistency, hidden_size: int) -> None:
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
        totals = torch.cat([self._window_sum, self._window_rows[None]])  # of which only the quotient counts
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
