"""The folder of a run, which no two runs write to at a time."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mlc.errors import UserError
from lightning_mlc.processes import raise_together
from lightning_mlc.training.metrics_file import METRICS

CONFIG = "config.yaml"
"""The file that makes a folder a run's. A run holds a lock on it, which the system gives back however it ends."""
WAIT = 15.0
"""Seconds: workers that prepare batches hold the lock of a run that was killed for as long as they take to notice."""

logger = logging.getLogger("lightning_mlc")
_held: list[int] = []
"""Descriptors of the locks that this process holds."""


class RunFolder(Callback):
    """Takes ``out`` for a ``fit`` before anything is written to it. It must come before all that writes.

    Args:
        is_new: The run begins in a new folder, so that it must be the one that makes ``config.yaml``.
        begins: There is no checkpoint to go on from: metrics that an earlier attempt left are removed.
    """

    def __init__(self, is_new: bool, begins: bool) -> None:
        self._is_new = is_new
        self._begins = begins

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error = None
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            try:
                _held.append(take(folder, self._is_new))
            except UserError as found:
                error = found
            else:
                if self._begins:
                    (folder / METRICS).unlink(missing_ok=True)
        raise_together(error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        give_back()


def give_back() -> None:
    """Unlock what this process has locked.

    A command calls it at its end. A callback cannot do it after an error, because checkpoints are written after the
    hooks for errors have run.
    """
    while _held:
        os.close(_held.pop())


def take(folder: Path, is_new: bool, wait: float | None = None) -> int:
    """Lock ``folder`` for this process, and make it and its ``config.yaml`` where they are not there.

    Args:
        folder: A run's ``out``.
        is_new: Nobody else may have made ``config.yaml``. One step of the file system decides on who is first.
        wait: Seconds to wait for another process that holds the lock; ``WAIT`` by default.

    Returns:
        The descriptor that holds the lock until it is closed.

    Raises:
        UserError: Another run has the folder, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / CONFIG, os.O_RDWR | os.O_CREAT | (os.O_EXCL if is_new else 0), 0o666)
    except FileExistsError as error:
        raise UserError("out", f"another run has begun in {folder}; give another --out") from error
    except OSError as error:
        raise UserError("out", f"cannot write to {folder} ({error.strerror}); give another --out") from error
    try:
        _hold(lock, folder, WAIT if wait is None else wait)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _hold(lock: int, folder: Path, wait: float) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks there
        return
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise UserError(
                    "out", f"another run is writing to {folder}; wait for its end, or give another --out"
                ) from error
            time.sleep(0.2)
        except OSError as error:  # some file systems of clusters have no locks
            logger.warning(
                "%s cannot be locked (%s), so do not start a second run there while this one runs",
                folder,
                error.strerror,
            )
            return
        else:
            return
