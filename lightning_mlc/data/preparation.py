"""Tokenising in several processes. The result does not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow

from lightning_mlc.data.garbage import without_old_objects
from lightning_mlc.data.spool import example_of
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError

ROWS_PER_PROCESS = 2000
"""With fewer rows per process, starting another process takes longer than it saves."""
MOST_PROCESSES = 16
"""Largest number of processes, unless the user asks for more."""


class Encoder(NamedTuple):
    """Turns examples into rows of a table."""

    chat: ChatTokenizer
    languages: tuple[str, ...]
    """BCP-47 codes of the languages to keep."""
    schema: pyarrow.Schema
    """Columns of the table."""

    def encode(self, written: list[bytes]) -> pyarrow.RecordBatch:
        """Tokenise examples that :meth:`~lightning_mlc.data.spool.Spool.read` returned."""
        rows = self.chat.encode_all([example_of(text) for text in written], self.languages)
        return pyarrow.RecordBatch.from_pylist(rows, schema=self.schema)


def processes_for(rows: int, asked: int | None) -> int:
    """Return the number of processes that tokenise.

    Args:
        rows: Number of examples.
        asked: The option ``data.num_proc``. None: choose a number.
    """
    if asked is not None:
        return asked
    return max(1, min(_cores(), MOST_PROCESSES, rows // ROWS_PER_PROCESS))


def encode_in_order(encoder: Encoder, parts: Iterable[list[bytes]], processes: int) -> Iterator[pyarrow.RecordBatch]:
    """Tokenise examples in order.

    This does not use ``datasets.map(num_proc=...)``, which reports an error of one process only when all others are
    done, and which cannot pickle tokenizers with their own code.

    Args:
        encoder: Turns examples into rows.
        parts: Examples, in parts. At most a few parts per process are in memory.
        processes: Number of processes. 1: only this process.

    Yields:
        The rows of each part.

    Raises:
        UserError: An example is wrong, or a process was killed.
    """
    with _without_threads(), without_old_objects():
        if processes == 1:
            yield from map(encoder.encode, parts)
            return
        # A forked process has the tokenizer immediately. It needs no lock that a thread of this process could hold.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(processes, context, _start, (encoder,)) as pool:
            waiting: deque[Future[pyarrow.RecordBatch]] = deque()
            try:
                for part in parts:
                    waiting.append(pool.submit(_encode, part))
                    if len(waiting) > 2 * processes:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool as error:
                raise UserError(
                    "data.num_proc",
                    f"one of the {processes} processes that tokenise was killed, possibly because memory was full; "
                    "set it to 1",
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None
"""The encoder of a process that tokenises."""


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends. Otherwise, if the parent is killed, it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(written: list[bytes]) -> pyarrow.RecordBatch:
    assert _encoder is not None
    return _encoder.encode(written)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on all systems; it respects containers and `taskset`
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _without_threads() -> Iterator[None]:
    """Keep tokenizers from starting threads inside the context, because a process with threads cannot fork safely."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
