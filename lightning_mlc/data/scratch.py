"""Temporary folders in the cache. None outlives its process for long."""

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
"""Seconds after which an unlocked folder counts as abandoned. A new folder is not locked immediately."""


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a temporary folder, and remove it at the end if it still exists.

    Folders of the same name that killed processes have left are removed first. A process locks its folder, and the
    system releases the lock however the process ends. On systems without locks no abandoned folder is removed.

    Args:
        parent: Folder for the new folder. It is made if it does not exist.
        name: Beginning of the new folder's name, after a dot.

    Yields:
        The new folder.

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
                "data.cache_dir", f"no space is left in {parent}; free some space, or give another folder"
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
    """Lock a folder.

    Returns:
        The descriptor that holds the lock. None: another process has it, or the system has no locks.
    """
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
