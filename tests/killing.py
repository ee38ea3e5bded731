"""Callbacks for tests of several processes: they end a run at a given point, or make processes disagree."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

_save = torch.save


class Kill(Callback):
    """Sends ``signal_number`` to its own process when that starts micro-batch ``batch`` (counted from 0).

    It does so only once: ``marker`` is a file that says that it has.

    Args:
        while_writing: Send the signal later, while the next checkpoint is written: while the ``file`` is written
            (in a folder, the one written last), or a ``part``, of which each process adds one to a folder.
        rank: Only in this process; null means in all processes.
        agent: Send the signal to the process that started this one instead.
        validating: ``batch`` counts validation batches.
    """

    def __init__(
        self,
        marker: str,
        batch: int,
        signal_number: int = int(signal.SIGKILL),
        while_writing: str | None = None,
        rank: int | None = None,
        agent: bool = False,
        validating: bool = False,
    ) -> None:
        self.marker = marker
        self.batch = batch
        self.signal_number = signal_number
        self.while_writing = while_writing
        self.rank = rank
        self.agent = agent
        self.validating = validating
        self.seen = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if not self.validating:
            self._at_batch(trainer)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.validating and not trainer.sanity_checking:
            self._at_batch(trainer)

    def _at_batch(self, trainer: Any) -> None:
        marker = Path(f"{self.marker}.{trainer.global_rank}")
        if self.rank in (None, trainer.global_rank) and self.seen == self.batch and not marker.exists():
            marker.touch()
            if self.while_writing:
                torch.save = self._save_half  # type: ignore[assignment]
            else:
                self._end()
        self.seen += 1

    def _end(self) -> None:
        os.kill(os.getppid() if self.agent else os.getpid(), self.signal_number)

    def _save_half(self, content: Any, file: Any) -> None:
        if isinstance(content, dict) != (self.while_writing == "file"):  # a part consists of tensors
            return _save(content, file)
        with file if hasattr(file, "write") else Path(file).open("wb") as opened:
            opened.write(b"PK\x03\x04 and then the power went")
            opened.flush()
            self._end()
        return None


class FullDisk(Callback):
    """From micro-batch ``batch`` on, process ``rank`` cannot write a file of more than ``size`` bytes."""

    def __init__(self, batch: int, rank: int = 0, size: int = 50_000) -> None:
        self.batch = batch
        self.rank = rank
        self.size = size

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


class Examples(Callback):
    """Appends the ids of each micro-batch to ``path``, with the optimizer step that uses it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self.path.open("a") as file:  # a single write, so that the processes do not mix their lines
            file.write(f"{trainer.global_step} {' '.join(batch.ids)}\n")


class OtherPrecision(Callback):
    """Makes process ``rank`` use bf16-mixed, whatever the others use."""

    def __init__(self, rank: int = 1) -> None:
        self.rank = rank

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # runs before the method of the module
        if trainer.global_rank == self.rank:
            trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")


class Spoil(Callback):
    """Puts NaN into a number of this process, at one optimizer step.

    Args:
        what: ``weight``: before a micro-batch is run, so that its loss is NaN. ``gradient``: before the optimizer's
            step, so that the loss is finite and the weights become NaN.
        step: Number of the optimizer step, from 0.
        rank: The process.
    """

    def __init__(self, what: str, step: int, rank: int = 0) -> None:
        self._what = what
        self._step = step
        self._rank = rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._is_due("weight", trainer):
            next(pl_module.policy.parameters()).data.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._is_due("gradient", trainer):
            next(p for p in pl_module.policy.parameters() if p.grad is not None).grad.fill_(float("nan"))

    def _is_due(self, what: str, trainer: Any) -> bool:
        return (what, trainer.global_step, trainer.global_rank) == (self._what, self._step, self._rank)
