"""Cheaper garbage collection while many rows are processed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_old_objects() -> Iterator[None]:
    """Make the garbage collector ignore existing objects inside the context: half a million of torch and transformers.

    Scanning them would take up to a fifth of the time that rows take, and would write to memory pages that forked
    processes share.
    """
    if gc.get_freeze_count():  # they are already frozen, by someone who will unfreeze them
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
