"""Progress bars of other libraries, while one of our commands runs: nothing, unless a step takes long."""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.std import tqdm  # type: ignore[import-untyped]

SECONDS = 5.0
"""What a step may take without a word."""
SECONDS_BETWEEN_LINES = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, a bar of ``tqdm`` shows only after five seconds, and where there is no terminal as a line now and then.

    ``transformers``, ``huggingface_hub`` and ``datasets`` all draw with it: weights loaded, GGUF tensors converted,
    files downloaded, rows mapped. Not all of them have a switch, so what they have in common is changed, and put back
    in the end: programs that import this package keep their bars.
    """
    original: Any = tqdm.__init__

    @functools.wraps(original)
    def begin(self: Any, *args: Any, **options: Any) -> None:
        from lightning_mlc.processes import is_first  # not above: a wrong option is told before torch is loaded

        options.setdefault("delay", SECONDS)
        if not is_first():
            options["disable"] = True
        elif not sys.stderr.isatty():
            interval = {"mininterval": SECONDS, "maxinterval": SECONDS}
            options = {"file": Lines(), "bar_format": LINE, **options, **interval}
        original(self, *args, **options)

    changed: Any = tqdm  # a type checker rightly forbids it
    changed.__init__ = begin
    try:
        yield
    finally:
        changed.__init__ = original


class Lines:
    """A file for one bar of ``tqdm``, which turns its drawings into lines on standard error.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._written: float | None = None

    def write(self, drawing: str) -> None:
        text = re.sub(r"\x1b\[\w*|[\r\n]", "", drawing).strip().replace(": : ", ": ")
        if not text:
            return
        if self._written is None or self._clock() - self._written >= SECONDS_BETWEEN_LINES:
            self._written = self._clock()
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Each line is flushed as it is written."""
