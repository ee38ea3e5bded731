"""Progress of counted work: a bar on a terminal, plain lines elsewhere.

Everything is written to standard error, and each line is flushed at once. Standard output is for results, such as
tables, which users redirect to files and programs. Only the first process of a run writes.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lightning_mlc.processes import is_first
from lightning_mlc.progress.heartbeat import Heartbeat

SECONDS = 30.0
"""After that many seconds without a line, one is written: when something is done, or to say that nothing is."""
SHARE = 1 / 20
"""A line is also written after that share of the work."""
FEWEST_SECONDS = 5.0
"""Fewest seconds between two lines. Work of one second would otherwise be twenty lines."""
SECONDS_OF_BAR = 0.2
"""Seconds between two drawings of a bar. Fetching figures from a GPU makes the program wait for it."""

Clock = Callable[[], float]
Figures = Callable[[], str]
"""Returns text to show after the count, such as a loss. It is called only when the text is shown."""
T = TypeVar("T")


def terminal() -> Console:
    """Standard error. It counts as a terminal only if it is one, even if ``FORCE_COLOR`` is set, as it is in CI."""
    return Console(stderr=True, force_terminal=sys.stderr.isatty())


def say(text: str) -> None:
    """Print one line to standard error, on the first process."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


class Track:
    """Counted work in progress. :func:`track` starts and ends it."""

    def __init__(
        self, title: str, total: float, unit: str, done: float, shown: bool, console: Console | None, clock: Clock
    ) -> None:
        self._title = title
        self._total = None if math.isinf(total) else int(total)
        self._unit = f" {unit}" if unit else ""
        self._first = self._done = done
        self._clock = clock
        self._began = self._said = self._updated = self._heard = clock()
        self._said_at = done
        self._lock = threading.Lock()
        self._console = terminal() if console is None else console
        self._shown = shown and is_first() and self._total != 0
        self._task: TaskID | None = None
        if not self._shown:
            return
        if self._console.is_interactive:
            self._task = _BARS.open(self._console, title, self._total, done)
            self._redraw("")
        else:
            of_all = "" if not done else f", {'all' if done == self._total else int(done)} of them done"
            self._line(f"{title} begins" if self._total is None else f"{title}: {self._total}{self._unit}{of_all}")
            if clock is time.monotonic:  # a thread cannot follow a clock that a test moves
                _HEARTBEAT.watch(self)

    def advance(self, count: float = 1, figures: Figures | None = None) -> None:
        """Count ``count`` more as done."""
        self.update(self._done + count, figures)

    def update(self, done: float, figures: Figures | None = None) -> None:
        """Set the total that is done. A unit in progress may be counted as a fraction."""
        with self._lock:
            self._done, self._updated = done, self._clock()
            if not self._shown or not self._is_due():
                return
            self._said, self._said_at = self._updated, done
        more = "" if figures is None else figures()
        if self._task is not None:
            self._redraw(more)
        else:
            self._line(", ".join(filter(None, (self._count(), more, self._left()))))

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``, and count each as done when the next one is requested."""
        for item in items:
            yield item
            self.advance()

    def end(self, figures: Figures | None = None) -> None:
        """End the work, which is complete."""
        if not self._shown:
            return
        self._close()
        seconds = self._clock() - self._began
        if self._task is not None:
            self._redraw("" if figures is None else figures())
            _BARS.close(self._task)
        elif figures is not None or seconds >= FEWEST_SECONDS:
            more = "" if figures is None else figures()
            self._line(", ".join(filter(None, (f"{self._count()} in {duration(seconds)}", more))))

    def stop(self) -> None:
        """End the work without a line, because of an error that is reported elsewhere."""
        if not self._shown:
            return
        self._close()
        if self._task is not None:
            _BARS.close(self._task)

    def beat(self) -> None:
        """Write a line if there was none for 30 seconds, and nothing has been done for five.

        If something was done in the last five seconds, the work will soon write a better line itself.
        """
        with self._lock:
            now = self._clock()
            silent = self._shown and self._task is None and now - max(self._said, self._heard) >= SECONDS
            if not silent or now - self._updated < FEWEST_SECONDS:
                return
            self._said = now
            self._line(f"{self._count()}, nothing new for {duration(now - self._updated)}")

    def rest(self) -> None:
        """Work inside this work has written lines until now."""
        with self._lock:
            self._heard = self._updated = self._clock()  # lines with its own figures are not delayed by this

    def _close(self) -> None:
        with self._lock:
            self._shown = False
        _HEARTBEAT.close(self)

    def _is_due(self) -> bool:
        passed = self._clock() - self._said
        if self._task is not None:
            return passed >= SECONDS_OF_BAR
        if self._total is not None and self._done >= self._total:  # the closing line reports it
            return False
        # A rounding error must not make the share a little larger than a whole number.
        share = math.inf if self._total is None else SHARE * (self._total - self._first) - 1e-9
        is_whole = self._done == int(self._done)
        return passed >= SECONDS or (passed >= FEWEST_SECONDS and is_whole and self._done - self._said_at >= share)

    def _count(self) -> str:
        return f"{self._title}: {int(self._done)}{'' if self._total is None else f' of {self._total}'}{self._unit}"

    def _left(self) -> str:
        if self._total is None or self._done <= self._first:
            return ""
        seconds = (self._clock() - self._began) / (self._done - self._first) * (self._total - self._done)
        return f"{duration(seconds)} left" if seconds > 0 else ""

    def _line(self, text: str) -> None:
        self._console.file.write(text + "\n")  # `print` would wrap it at the width of the console
        self._console.file.flush()

    def _redraw(self, figures: str) -> None:
        assert self._task is not None
        count = f"{int(self._done)}{'' if self._total is None else f'/{self._total}'}{self._unit}"
        more = ", ".join(filter(None, (figures, self._left())))
        _BARS.update(self._task, self._done, count, more)


class _Bars:
    """The bars on the terminal. There is one block of bars for all work in progress."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._open: set[TaskID] = set()

    def open(self, console: Console, title: str, total: int | None, done: float) -> TaskID:
        if self._progress is None:
            parts = ("{task.description}", "{task.fields[count]}", "{task.fields[more]}")
            title_column, count_column, more_column = (TextColumn(part) for part in parts)
            self._progress = Progress(
                title_column,
                BarColumn(),
                count_column,
                more_column,
                console=console,
                # Lines that are printed meanwhile appear above the bar, but a redirected output is left alone.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._progress.start()
        task = self._progress.add_task(escape(title), total=total, completed=int(done), count="", more="")
        self._open.add(task)
        return task

    def update(self, task: TaskID, done: float, count: str, more: str) -> None:
        assert self._progress is not None
        self._progress.update(task, completed=done, count=count, more=escape(more))

    def close(self, task: TaskID) -> None:
        """Close a bar. The last bar stays on the terminal; a bar disappears while others are open."""
        assert self._progress is not None
        self._open.remove(task)
        if self._open:
            self._progress.remove_task(task)
        else:
            self._progress.stop()
            self._progress = None


_BARS = _Bars()
_HEARTBEAT = Heartbeat()


@contextmanager
def track(
    title: str,
    total: float,
    unit: str = "",
    done: float = 0,
    shown: bool = True,
    console: Console | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Track]:
    """Show the progress of the work inside.

    On a terminal there is a bar. Elsewhere there is a line at the start. Another one follows when something is done
    and the last line is 30 seconds old, or when a further twentieth of the work is done and the last line is five
    seconds old. If nothing is done for longer, a line says so. Work that took longer than five seconds, or has figures
    to show, ends with a line.

    Args:
        title: Name of the work. No text of a prompt or response.
        total: How many units there are; infinity if that is not known.
        unit: Name of the units, in the plural.
        done: How many are done already.
        shown: False shows nothing.
        console: Where it is shown; standard error by default.
        clock: Returns seconds from any starting point.
    """
    work = Track(title, total, unit, done, shown, console, clock)
    try:
        yield work
    except BaseException:
        work.stop()
        raise
    work.end()


def size(count: int) -> str:
    """Bytes in words: ``12 kB``, ``3.4 MB``, ``1.2 GB``."""
    if count < 10**6:
        return f"{count / 1000:.0f} kB"
    return f"{count / 10**6:.1f} MB" if count < 10**9 else f"{count / 10**9:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds in words: ``12 s``, ``3 min 05 s``, ``2 h 04 min``, ``3 d 04 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24:02} h"
