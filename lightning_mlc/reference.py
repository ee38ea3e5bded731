"""The frozen model that a preference objective measures the policy against."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lightning_mlc.data.batches import Batch
from lightning_mlc.forward import Grid, run_batch
from lightning_mlc.models.policy import Policy
from lightning_mlc.sharding import is_sharded


class Reference:
    """Scores responses as the initial model does.

    Not an ``nn.Module``, and so in no module's registry: neither optimizer, checkpoint, DDP nor
    ``train()`` ever reaches it. Under LoRA it is the policy with its adapters off and costs no memory.
    """

    def __init__(self, policy: Policy) -> None:
        self._adapted = hasattr(policy.model, "disable_adapter")
        self.policy = policy if self._adapted else copy.deepcopy(policy).requires_grad_(False).eval()
        """The model that is run."""

    @torch.no_grad()
    def score(self, batch: Batch) -> Grid:
        """Log-probabilities of the responses in ``batch``, without gradients."""
        rows = batch.without_prompts()
        if not self._adapted:
            if not is_sharded(self.policy):  # whose parts are where they belong
                self.policy.to(batch.keys.device)
            return run_batch(self.policy, rows)
        was_training = self.policy.training
        self.policy.eval()
        model: Any = self.policy.model
        try:
            with model.disable_adapter():
                return run_batch(self.policy, rows)
        finally:
            self.policy.train(was_training)
