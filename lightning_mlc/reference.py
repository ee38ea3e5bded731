"""The frozen model that a preference objective measures the policy against."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lightning_mlc.data.batches import Batch
from lightning_mlc.forward import Grid, run_batch
from lightning_mlc.models.policy import Policy


class Reference:
    """Scores responses as the initial model does.

    Not an ``nn.Module``, and so in no module's registry: neither optimizer, checkpoint, DDP nor
    ``train()`` ever reaches it. Under LoRA it is the policy with its adapters off and costs no memory.
    """

    def __init__(self, policy: Policy) -> None:
        self._adapted = hasattr(policy.model, "disable_adapter")
        self._policy = policy if self._adapted else copy.deepcopy(policy).requires_grad_(False).eval()

    @property
    def policy(self) -> Policy:
        """What it runs responses through: a model of its own, or the policy whose adapters it turns off."""
        return self._policy

    @torch.no_grad()
    def score(self, batch: Batch) -> Grid:
        """Log-probabilities of the responses in ``batch``, without gradients."""
        rows = batch.without_prompts()
        if not self._adapted:
            self._policy.to(batch.keys.device)
            return run_batch(self._policy, rows)
        was_training = self._policy.training
        self._policy.eval()
        model: Any = self._policy.model
        try:
            with model.disable_adapter():
                return run_batch(self._policy, rows)
        finally:
            self._policy.train(was_training)
