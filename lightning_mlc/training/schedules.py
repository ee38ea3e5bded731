"""Learning-rate schedules for runs with a known number of steps."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lightning_mlc.errors import UserError


class Warmup(LambdaLR):
    """Linear warm-up, then constant, linear or cosine decay to ``final`` of the rate at the run's last step.

    Args:
        optimizer: The optimizer whose rates are scheduled.
        warmup: Length of the warm-up. Below 1: a fraction of the run, otherwise a number of steps.
        decay: Shape after the warm-up.
        final: Share of the learning rate that is left at the last step.
        total_steps: Number of optimizer steps of the run. null: as the trainer says.
        from_zero: Warm up as the schedules of ``transformers`` do: start at a rate of 0, with which the first step
            changes nothing, and round a fraction of the run up instead of to the nearest step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.1,
        decay: Literal["constant", "linear", "cosine"] = "cosine",
        final: float = 0.0,
        total_steps: int | None = None,
        from_zero: bool = False,
    ) -> None:
        if warmup < 0:
            raise UserError("model.scheduler.warmup", f"must not be negative, got {warmup}")
        if not 0 <= final <= 1:
            raise UserError("model.scheduler.final", f"must be from 0 to 1, got {final}")
        self.warmup = warmup
        self.decay = decay
        self.final = final
        self.total_steps = total_steps
        self.from_zero = from_zero
        super().__init__(optimizer, self._share)

    def set_total_steps(self, total_steps: float) -> None:
        """Set the length of the run, unless the configuration has set it, and apply the rate of the first step.

        Raises:
            UserError: The number of steps is not known.
        """
        if self.total_steps is None:
            if not math.isfinite(total_steps):
                raise UserError(
                    "model.scheduler.total_steps",
                    "is not set, and the number of steps is not known (trainer.max_epochs is -1); "
                    "give it, or trainer.max_steps",
                )
            self.total_steps = int(total_steps)
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * self._share(self.last_epoch)
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _share(self, step: int) -> float:
        if self.total_steps is None:
            return 1.0
        whole = math.ceil if self.from_zero else round
        warmup = whole(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return step / warmup if self.from_zero else (step + 1) / (warmup + 1)
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        shape = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final + (1 - self.final) * shape


def by_step(scheduler: Any) -> Any:
    """``scheduler``, if it can be stepped after every optimizer step.

    Raises:
        UserError: It cannot, because it follows a metric.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "model.scheduler",
            "ReduceLROnPlateau follows a metric, but here rates change after every step; give "
            "lightning_mlc.training.schedules.Warmup, or another scheduler of torch.optim.lr_scheduler",
        )
    return scheduler
