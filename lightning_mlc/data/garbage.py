"""What garbage collection costs where many rows are gone through."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_old_objects() -> Iterator[None]:
    """The garbage collector leaves alone what is there already: half a million objects of torch and transformers.

    To look through them takes up to a fifth of the time that rows take. It also writes to pages that forked processes
    share.
    """
    if gc.get_freeze_count():  # somebody has frozen them, for longer
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
