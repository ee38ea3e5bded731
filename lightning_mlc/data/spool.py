"""Examples between reading and tokenising. They are on disk, because a large file does not fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow

from lightning_mlc.data.garbage import without_old_objects
from lightning_mlc.data.records import DataKind, Example

ROWS = 256
"""Number of examples that are written, and later tokenised, together."""

_SCHEMA = pyarrow.schema([("example", pyarrow.binary())])


@dataclass(frozen=True)
class Spool:
    """Examples in an Arrow file, and a summary of them."""

    path: Path
    """The file."""
    kind: DataKind
    """Which responses the examples have."""
    languages: tuple[str, ...]
    """Languages of their prompts, in order of first appearance."""
    rows: int
    """Number of examples."""
    digest: str
    """Hash of the examples and their order."""

    @classmethod
    @without_old_objects()
    def write(cls, examples: Iterable[Example], path: Path) -> Spool:
        """Write examples to a file. At most ``ROWS`` of them are in memory at a time.

        Args:
            examples: At least one example.
            path: The file.

        Raises:
            UserError: An example cannot be read.
        """
        hashed = hashlib.sha256()
        languages: dict[str, None] = {}
        kind: DataKind | None = None
        rows = 0
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, _SCHEMA) as writer:
            left = iter(examples)
            while part := list(islice(left, ROWS)):
                texts = []
                for example in part:
                    kind = kind or example.kind
                    languages |= dict.fromkeys(example.prompts)
                    texts.append(json.dumps(vars(example), sort_keys=True).encode())
                    hashed.update(texts[-1])
                rows += len(texts)
                writer.write_batch(pyarrow.record_batch([pyarrow.array(texts, pyarrow.binary())], schema=_SCHEMA))
        assert kind is not None, "read_rows refuses data without rows"
        return cls(path, kind, tuple(languages), rows, hashed.hexdigest())

    def read(self) -> Iterator[list[bytes]]:
        """Read the examples, ``ROWS`` at a time, in the form that :func:`example_of` decodes."""
        with pyarrow.OSFile(str(self.path), "rb") as file, pyarrow.ipc.open_stream(file) as reader:
            for batch in reader:
                yield batch.column(0).to_pylist()


def example_of(written: bytes) -> Example:
    """Decode an example that :meth:`Spool.read` returned."""
    fields: dict[str, Any] = json.loads(written)
    fields["translated"] = {language: tuple(pair) for language, pair in fields["translated"].items()}
    return Example(**fields)
