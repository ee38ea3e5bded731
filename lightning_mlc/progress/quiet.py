"""Other libraries during our commands: they show bars only if a step takes long, and ask no hub unasked."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.std import tqdm  # type: ignore[import-untyped]

SECONDS = 5.0
"""A step that takes less shows no bar."""
SECONDS_BETWEEN_LINES = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}"
BITSANDBYTES_KERNEL = "kernels-community/quantization-bitsandbytes"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Show bars of ``tqdm`` only after five seconds, and without a terminal as an occasional line.

    ``transformers``, ``huggingface_hub`` and ``datasets`` all use ``tqdm``: to load weights, convert GGUF tensors,
    download files and map rows. Not all of them have a switch, so ``tqdm`` itself is changed, and restored at the end.
    Programs that import this package keep their bars.
    """
    _keep_bitsandbytes_local()
    original: Any = tqdm.__init__

    @functools.wraps(original)
    def begin(self: Any, *args: Any, **options: Any) -> None:
        from lightning_mlc.processes import is_first  # here, so that a wrong option is reported before torch is loaded

        options.setdefault("delay", SECONDS)
        if not is_first():
            options["disable"] = True
        elif not sys.stderr.isatty():
            interval = {"mininterval": SECONDS, "maxinterval": SECONDS}
            options = {"file": Lines(), "bar_format": LINE, **options, **interval}
        original(self, *args, **options)

    changed: Any = tqdm  # `Any`, because a type checker forbids to change a method
    changed.__init__ = begin
    try:
        yield
    finally:
        changed.__init__ = original


def _keep_bitsandbytes_local() -> None:
    """Keep ``bitsandbytes`` from loading code from the hub while it is imported.

    On CPUs with bfloat16 instructions it does so if the package ``kernels`` is installed, and warns if that fails.
    ``peft`` imports it for all adapters, quantised or not. Training could not use this code: see
    :func:`lightning_mlc.models.quantization.keep_trainable`. A value that the user has set stays.
    """
    os.environ.setdefault(
        "LOCAL_KERNELS", f"{BITSANDBYTES_KERNEL}={os.devnull}"
    )  # no folder, so that it gives up at once
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Lines:
    """A file for one bar of ``tqdm`` that converts its drawings to lines on standard error.

    Args:
        clock: Returns seconds from any starting point.
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
        """Do nothing, because each line is flushed when it is written."""
