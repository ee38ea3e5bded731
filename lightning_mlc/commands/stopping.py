"""Commands that a user, or the scheduler of a cluster, may stop at any moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_mlc.errors import Interrupted


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """End in order, with ``message``, after Ctrl-C or SIGTERM: unfinished files are removed.

    Args:
        message: What became of the work.

    Raises:
        Interrupted: The command was stopped.
    """
    may_listen = threading.current_thread() is threading.main_thread()  # Python allows no other thread to
    before: Any = signal.signal(signal.SIGTERM, _stop) if may_listen else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(None, message) from error
    finally:
        if may_listen:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt
