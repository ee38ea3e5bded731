"""What is read from Lightning's loops and trainer, or done to them, beyond what it documents."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, Strategy


def ends_window(trainer: Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step follows the micro-batch ``batch_idx`` of the epoch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def finds_unused_parameters(strategy: Strategy) -> bool:
    """Whether ``strategy`` takes parameters without a gradient: any but DDP, and DDP if it was told to."""
    return not isinstance(strategy, DDPStrategy) or bool(strategy._ddp_kwargs.get("find_unused_parameters"))


def logs_step(trainer: Trainer) -> bool:
    """Whether the optimizer step that runs now is one that is logged."""
    every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0


def profiled(trainer: Trainer, name: str) -> AbstractContextManager[Any]:
    """Report the time inside to ``--trainer.profiler``, as ``[Step]NAME``."""
    profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
    return profiler.profile(f"[Step]{name}")
