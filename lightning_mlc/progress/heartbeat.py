"""A sign of life in a log file while one piece of work, such as an optimizer step, takes long.

Work tells how far it is when something is done. In between a thread looks whether that is long ago.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

PERIOD = 1.0
"""Seconds from one look to the next."""


class Beats(Protocol):
    """Work that can say that it is still under way."""

    def beat(self) -> None:
        """Say so, if nothing has been said for long. Called from another thread."""

    def rest(self) -> None:
        """Work inside it has told of itself until now."""


class Heartbeat:
    """Watches the work of this process that is under way: of work within work the innermost, which says most.

    Its thread lives as long as there is any, and holds none of it: what is forgotten is not watched.

    Args:
        period: Seconds from one look to the next.
    """

    def __init__(self, period: float = PERIOD) -> None:
        self._period = period
        self._lock = threading.Lock()
        self._open: list[weakref.ref[Beats]] = []
        self._end: threading.Event | None = None
        """Of the thread that watches; None where there is none."""

    def watch(self, work: Beats) -> None:
        """Watch ``work`` until it is closed."""
        with self._lock:
            self._open.append(weakref.ref(work))
            if self._end is None:
                self._end = threading.Event()
                threading.Thread(target=self._look, args=(self._end,), name="heartbeat", daemon=True).start()

    def close(self, work: Beats) -> None:
        """``work`` is over."""
        with self._lock:
            self._open = [one for one in self._open if one() is not work]
            outer = self._innermost()
            if outer is None and self._end is not None:
                self._end.set()
                self._end = None
        if outer is not None:
            outer.rest()

    def _innermost(self) -> Beats | None:
        self._open = [one for one in self._open if one() is not None]
        return self._open[-1]() if self._open else None

    def _look(self, end: threading.Event) -> None:
        while not end.wait(self._period):
            with self._lock:
                work = self._innermost()
                if work is None:  # it was forgotten
                    if self._end is end:
                        self._end = None
                    return
            work.beat()
            del work
