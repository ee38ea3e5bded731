"""Lines in a log file while one piece of work, such as an optimizer step, takes long.

Work reports its progress when something is done. Meanwhile a thread checks how long ago that was.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

PERIOD = 1.0
"""Seconds between two checks."""


class Beats(Protocol):
    """Work that can report that it is still in progress."""

    def beat(self) -> None:
        """Write a line if there was none for long. Called from another thread."""

    def rest(self) -> None:
        """Work inside this work has written lines until now."""


class Heartbeat:
    """Watches the work of this process. Of nested work it watches the innermost, whose lines say most.

    Its thread runs while there is work. It keeps no work alive: work that is garbage-collected is no longer watched.

    Args:
        period: Seconds between two checks.
    """

    def __init__(self, period: float = PERIOD) -> None:
        self._period = period
        self._lock = threading.Lock()
        self._open: list[weakref.ref[Beats]] = []
        self._end: threading.Event | None = None
        """Ends the thread that watches. None if there is no thread."""

    def watch(self, work: Beats) -> None:
        """Watch ``work`` until it is closed."""
        with self._lock:
            self._open.append(weakref.ref(work))
            if self._end is None:
                self._end = threading.Event()
                threading.Thread(target=self._look, args=(self._end,), name="heartbeat", daemon=True).start()

    def close(self, work: Beats) -> None:
        """Stop watching ``work``, which has ended."""
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
                if work is None:  # it was garbage-collected
                    if self._end is end:
                        self._end = None
                    return
            work.beat()
            del work
