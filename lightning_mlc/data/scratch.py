"""Folders for what is not finished yet, in the cache. None outlives its process for long."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_mlc.errors import UserError

AGE = 60
"""Seconds after which a folder that no process holds is a left one. A new one is not held at once."""


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in ``parent``, which is made if it is not there. It is removed at the end, if it still is there.

    Those of the same ``name`` that processes left when they were killed are removed first. A process holds a lock on
    its folder, which the system gives back however the process ends; where there are no locks, nothing is removed.

    Raises:
        UserError: ``parent`` cannot be written to, or its disk is full.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left(parent, f".{name}-")
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    except OSError as error:
        raise UserError(
            "data.cache_dir", f"cannot write to {parent} ({error.strerror}); give another folder"
        ) from error
    lock = _lock(folder)
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                "data.cache_dir", f"there is no room left in {parent}; make some, or give another folder"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_left(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        try:
            is_old = time.time() - folder.stat().st_mtime > AGE
        except FileNotFoundError:  # its process has just removed it
            continue
        if is_old and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """The descriptor that holds the lock of ``folder``; None if another process does, or if there are no locks."""
    try:
        import fcntl

        lock = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
