"""Files that are written whole or not at all: what cannot be completed leaves the file that was there before."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"
"""How the name of a file ends that is being written. A killed process leaves such a file; nothing reads it."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` at the end, when it is complete and on the disk.

    The new file has a hidden name in the same folder until then. Its permissions follow the umask. An error inside
    removes it, and ``path`` stays as it was. Several processes may write the same ``path`` at once: the last one wins.
    What is there and is no file, such as ``/dev/null`` or a pipe, stays and is written to directly.

    Args:
        path: The file, which may exist. Its folder must exist.

    Yields:
        The new file, opened for writing bytes.

    Raises:
        OSError: The folder cannot be written to, or its disk is full.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        with suppress(OSError):  # on a read-only disk, where the first error says what is wrong
            unfinished.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, a text as UTF-8. Raises as :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
