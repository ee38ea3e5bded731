"""From hidden states to the representations that are compared: extractor and centring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mlc.consistency.settings import Consistency


class Representation(nn.Module):
    """Computes the representations that the terms compare from hidden states.

    It runs in the extractor's dtype (float32 unless the whole model is in half precision), outside autocast:
    training moves the representations towards rank one, and there the rounding of half precision would be larger
    than the signal.

    Args:
        settings: Settings of the consistency terms.
        hidden_size: Width H of the model's hidden states.
    """

    MEAN_DECAY = 0.9
    """Share of the running mean that an optimizer step keeps."""

    mean: Tensor
    """(H,): running mean of the hidden states; 0 until the first step has ended."""
    steps_seen: Tensor
    """(): number of optimizer steps in the running mean."""

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
        """Compute representations.

        Args:
            states: (B, L, H) hidden states of B prompts in L languages.

        Returns:
            (B, L, D) representations, with D the extractor's width, or H without an extractor.
        """
        with torch.autocast(device_type=states.device.type, enabled=False):
            parameter = next(self.extractor.parameters(), None)
            states = states.to(parameter.dtype) if parameter is not None else states.float()
            if self.settings.center:
                states = states - self.mean
            extracted: Tensor = self.extractor(states)
            return extracted

    @torch.no_grad()
    def observe(self, states: Tensor, mask: Tensor) -> None:
        """Collect the hidden states of a micro-batch for the running mean.

        The mean itself changes only at the end of an optimizer step (:meth:`fold_mean`), so that it does not depend
        on how the step is cut into micro-batches.

        Args:
            states: (B, L, H) hidden states.
            mask: (B, L) bool, False where the prompt does not exist in the language. States there must be finite.
        """
        if self.settings.center:
            self._window_sum += (states.to(self._window_sum.dtype) * mask[:, :, None]).sum((0, 1))
            self._window_rows += mask.sum()

    @torch.no_grad()
    def fold_mean(self) -> None:
        """Update the running mean with the states that all processes have collected since the last call."""
        if not self.settings.center:
            return
        totals = torch.cat([self._window_sum, self._window_rows[None]])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        seen = totals[-1] > 0
        window_mean = totals[:-1] / totals[-1].clamp(min=1)
        # The first step sets the mean; later ones move it by their share.
        keep = torch.where(self.steps_seen > 0, self.MEAN_DECAY, 0.0)
        self.mean.copy_(torch.where(seen, keep * self.mean + (1 - keep) * window_mean, self.mean))
        self.steps_seen += seen
        self.forget_window()

    def forget_window(self) -> None:
        """Forget the states that were collected since the running mean was updated."""
        if self.settings.center:
            self._window_sum.zero_()
            self._window_rows.zero_()
