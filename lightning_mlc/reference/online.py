"""The reference model itself, run when its scores are needed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_mlc.checkpoints.format import load_into
from lightning_mlc.data.batches import Batch
from lightning_mlc.distributed.sharding import move
from lightning_mlc.models.forward import Grid, run_batch
from lightning_mlc.models.policy import Policy
from lightning_mlc.reference.scores import ReferenceScores


@contextmanager
def as_reference(policy: Policy) -> Iterator[Policy]:
    """``policy`` without adapters, dropout or gradients, inside the context."""
    model: Any = policy.model
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if _has_adapters(policy) else nullcontext():
            yield policy
    finally:
        policy.train(was_training)


def _has_adapters(policy: Policy) -> bool:
    return hasattr(policy.model, "disable_adapter")


class OnlineReference:
    """Scores responses as the initial model does, or as one that follows the policy (TR-DPO, arXiv 2404.09656).

    Not an ``nn.Module``, and so in no module's registry: neither optimizer, checkpoint, DDP nor
    ``train()`` ever reaches it. Under LoRA it is the policy with its adapters off and costs no memory.
    """

    KEY: ClassVar[str] = "lightning_mlc_reference"
    """Where a checkpoint has the weights of a reference that was updated."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy if _has_adapters(policy) else copy.deepcopy(policy).requires_grad_(False).eval()
        self._evaluated: dict[str, ReferenceScores] = {}

    @property
    def policy(self) -> Policy:
        """What it runs responses through: a model of its own, or the policy whose adapters it turns off."""
        return self._policy

    def grid(self, batch: Batch, split: str, translations: bool = False, pool: bool = False) -> Grid:
        """Scores of ``batch`` of the data's ``split``. In evaluation, which repeats, they are computed once.

        ``translations`` asks for those of responses in the other languages too, ``pool`` for mean states (see
        :class:`~lightning_mlc.models.forward.Grid`), which are not kept.
        """
        if split == "train" or pool:
            return self.score(batch, translations, pool)
        known = self._evaluated.get(split, ReferenceScores.union([]))
        if not known.missing(batch.keys.tolist()):
            return known.grid(batch)
        grid = self.score(batch)
        self._evaluated[split] = ReferenceScores.union([known, ReferenceScores.of(batch, grid)])
        return grid

    def score(self, batch: Batch, translations: bool = False, pool: bool = False) -> Grid:
        """Log-probabilities of the responses in ``batch``, without gradients."""
        rows = dataclasses.replace(batch, prompts=()) if translations else batch.without_translations()
        move(self._policy, batch.keys.device)
        with as_reference(self._policy):
            return run_batch(self._policy, rows, pool=pool)

    @torch.no_grad()
    def update(self, policy: Policy, share: float) -> None:
        """Move each weight of a reference of its own towards the policy's: ``share * policy + (1 - share) * old``."""
        move(self._policy, next(policy.parameters()).device)
        for own, other in zip(self._policy.parameters(), policy.parameters(), strict=True):
            own.lerp_(other, share)
        self._evaluated.clear()  # they were those of the old weights

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the reference model."""
        return dict(self._policy.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the weights that :meth:`state_dict` gave."""
        load_into(self._policy.state_dict(), state)
        self._evaluated.clear()
