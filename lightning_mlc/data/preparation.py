"""Tokenising in several processes. What comes out does not depend on how many there are."""

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
"""With fewer rows for each, another process is not worth its start."""
MOST_PROCESSES = 16
"""That are taken unasked."""


class Encoder(NamedTuple):
    """Examples to rows of a table."""

    chat: ChatTokenizer
    languages: tuple[str, ...]
    schema: pyarrow.Schema

    def encode(self, written: list[bytes]) -> pyarrow.RecordBatch:
        """The rows of these examples, which are as :meth:`~lightning_mlc.data.spool.Spool.read` gives them."""
        rows = self.chat.encode_all([example_of(text) for text in written], self.languages)
        return pyarrow.RecordBatch.from_pylist(rows, schema=self.schema)


def processes_for(rows: int, asked: int | None) -> int:
    """How many processes tokenise so many ``rows``; ``asked`` is ``data.num_proc``."""
    if asked is not None:
        return asked
    return max(1, min(_cores(), MOST_PROCESSES, rows // ROWS_PER_PROCESS))


def encode_in_order(encoder: Encoder, parts: Iterable[list[bytes]], processes: int) -> Iterator[pyarrow.RecordBatch]:
    """What ``encoder`` makes of each of ``parts``, in their order.

    Not ``datasets.map(num_proc=...)``, which tells an error of one process only once all others are done, and which
    needs functions that can be pickled, as tokenizers with code of their own cannot.

    Args:
        encoder: Makes rows of examples.
        parts: Examples, some at a time. A few parts per process are held.
        processes: 1 works in this one.

    Raises:
        UserError: A row is wrong: the first one of the part that is.
    """
    with _without_threads(), without_old_objects():
        if processes == 1:
            yield from map(encoder.encode, parts)
            return
        # A forked process has the tokenizer at once; it runs nothing that another thread of this one could hold.
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
                    f"one of the {processes} processes that tokenise was ended from outside, for want of memory "
                    "perhaps; set it to 1",
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None
"""Of a process that tokenises."""


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process that is killed tells its own ones nothing, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(written: list[bytes]) -> pyarrow.RecordBatch:
    assert _encoder is not None
    return _encoder.encode(written)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not everywhere; it knows of containers and `taskset`
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _without_threads() -> Iterator[None]:
    """Tokenizers start no threads of their own: after that, processes could not be forked safely."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
