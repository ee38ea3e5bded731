"""Callbacks for tests of several processes: they end a run at a given place, or put a process at odds with others."""

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
    """Sends ``signal_number`` to its own process when micro-batch ``batch`` that it starts (from 0) does.

    Once: ``marker`` is a file that says it has been done.

    Args:
        while_writing: In the middle of the first checkpoint after that instead: of the ``file`` (in a folder the one
            that is written last), or of a ``part``, of which each process adds one to a folder.
        rank: In this process alone; null takes all.
        agent: The signal goes to the process that has started this one instead.
        validating: ``batch`` counts those of validation.
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
        if isinstance(content, dict) != (self.while_writing == "file"):  # a part is made of tensors
            return _save(content, file)
        with file if hasattr(file, "write") else Path(file).open("wb") as opened:
            opened.write(b"PK\x03\x04 and then the power went")
            opened.flush()
            self._end()
        return None


class FullDisk(Callback):
    """From micro-batch ``batch`` on, process ``rank`` can write no file of more than ``size`` bytes."""

    def __init__(self, batch: int, rank: int = 0, size: int = 50_000) -> None:
        self.batch = batch
        self.rank = rank
        self.size = size

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


class Examples(Callback):
    """Appends the ids of each micro-batch to ``path``, with the optimizer step that it is for."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self.path.open("a") as file:  # one write, so that processes do not mix their lines
            file.write(f"{trainer.global_step} {' '.join(batch.ids)}\n")


class OtherPrecision(Callback):
    """Process ``rank`` has settled on bf16-mixed, whatever the others have."""

    def __init__(self, rank: int = 1) -> None:
        self.rank = rank

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # before that of the module
        if trainer.global_rank == self.rank:
            trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
