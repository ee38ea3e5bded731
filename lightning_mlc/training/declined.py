"""How many harmful and how many ordinary prompts the model declines, measured at every validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.kinds import HARMFUL, ORDINARY
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.judges.refusal import verdict_on
from lightning_mlc.metrics import LanguageMean, language_differences
from lightning_mlc.progress.bars import say
from lightning_mlc.training.prediction import Response


@dataclass(frozen=True)
class Declined:
    """Answers validation prompts, and logs the shares that are declined, in each language.

    The rules of the judge ``refusal`` decide: they read how a response begins, and not whether it is safe. With few
    prompts the shares are coarse. Measure the checkpoint that you keep with ``lightning-mlc evaluate``.

    Args:
        prompts: Number of harmful prompts, and of ordinary ones, that are answered in every language.
        max_new_tokens: Longest response, in tokens. The judge needs only its beginning.
        max_ordinary: The run ends after a validation in which a larger share of ordinary prompts is declined, averaged
            over the languages; from 0 to below 1. null: no limit. A validation before the first step does not count.

    Raises:
        UserError: A setting is out of range.
    """

    prompts: int = 8
    max_new_tokens: int = 32
    max_ordinary: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"model.declined.{name}", f"must be at least 1, got {getattr(self, name)}")
        if self.max_ordinary is not None and not 0 <= self.max_ordinary < 1:
            raise UserError(
                "model.declined.max_ordinary", f"must be from 0 to below 1, or null, got {self.max_ordinary}"
            )

    def end_above(self, results: Mapping[str, float], trainer: Trainer) -> None:
        """End the run if a validation in training found more than ``max_ordinary``."""
        if self.max_ordinary is None or trainer.state.fn != TrainerFn.FITTING:
            return
        share = results[f"val/declined/{ORDINARY}/mean"]
        if share <= self.max_ordinary + 1e-9:  # a mean may be rounded up
            return
        found = f"{share:.1%} of ordinary prompts are declined"
        limit = f"(model.declined.max_ordinary: {self.max_ordinary:.1%})"
        if trainer.sanity_checking:
            say(f"{found} before training, more than the limit {limit}: the run may end at its first validation")
        elif trainer.global_step > 0:
            trainer.should_stop = True
            say(f"the run ends: {found} {limit}")


class DeclinedShares(nn.Module):
    """Shares of prompts that are declined, exact on any number of processes.

    Args:
        languages: Codes of the languages, the source language first.
    """

    def __init__(self, languages: tuple[str, ...]) -> None:
        super().__init__()
        self._shares: Any = nn.ModuleDict(
            {
                HARMFUL: LanguageMean(languages, higher_is_better=True),
                ORDINARY: LanguageMean(languages, higher_is_better=False),
            }
        )

    def reset(self) -> None:
        """Forget all responses."""
        for share in self._shares.values():
            share.reset()

    def update(self, batch: Batch, responses: list[Response]) -> None:
        """Add responses.

        Args:
            batch: B examples.
            responses: Responses to their prompts.
        """
        device = batch.keys.device
        assert batch.is_ordinary is not None
        is_ordinary = batch.is_ordinary.tolist()
        for kind, share in self._shares.items():
            own = [one for one in responses if is_ordinary[one.example] == (kind == ORDINARY)]
            examples = torch.tensor([one.example for one in own], dtype=torch.int64, device=device)
            language = torch.tensor([one.language for one in own], dtype=torch.int64, device=device)
            declined = torch.tensor([float(verdict_on(one.text).refused is True) for one in own], device=device)
            share.update(batch.keys[examples], language, declined)

    def results(self) -> dict[str, Tensor]:
        """Shares from 0 to 1, by names such as ``declined/ordinary/sw``. All processes call it together.

        ``declined/gap/...`` is the share of harmful prompts minus that of ordinary ones.
        """
        shares = {kind: share.compute() for kind, share in self._shares.items()}
        shares["gap"] = language_differences(shares[HARMFUL], shares[ORDINARY])
        return {f"declined/{kind}/{name}": value for kind, own in shares.items() for name, value in own.items()}
