"""Ends a run after a signal: from a cluster's scheduler, from ``torchrun`` or from ``kill``."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from lightning_mlc.lightning_internals import after_signal_handlers, stop_signal_broadcast

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EndWhenAsked(Callback):
    """Ends training after SIGTERM or SIGUSR1 to any process. All processes end before the same batch.

    A handler here only sets a flag. Lightning's own handlers exchange tensors at once, even in the middle of a sum over
    processes, and each process ends when it notices the signal. Under SLURM they save in the middle of a step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._group: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")  # it does not wait for a GPU
        after_signal_handlers(trainer, self._listen)
        stop_signal_broadcast(trainer)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._take_note)

    def _take_note(self, *_: Any) -> None:
        # Workers that prepare batches have this handler too, and must not end: a scheduler may signal all processes.
        self._asked = True

    def on_train_batch_start(self, *_: Any) -> None:
        self._end_if_asked()

    def on_validation_batch_start(self, *_: Any) -> None:
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        asked = torch.tensor([self._asked], dtype=torch.int32)
        if self._group is not None:
            distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self._group)
        if asked:
            raise SIGTERMException
