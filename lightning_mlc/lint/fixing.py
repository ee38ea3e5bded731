"""Write a copy of a file in which wrong translations are missing, which training allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lightning_mlc.data.file_layouts import without
from lightning_mlc.data.json_writing import json_line
from lightning_mlc.errors import UserError
from lightning_mlc.files.atomic import whole_file
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow


def cannot_write(option: str, path: object, error: OSError) -> UserError:
    """The error for a file that cannot be written."""
    reason = error.strerror or type(error).__name__
    return UserError(option, f"cannot write {path} ({reason}); nothing of it is kept, so run the same command again")


class Fixer:
    """Writes rows, each without its translations that have an error.

    A row with an error in the source language is left out, because nothing can take its place.
    """

    def __init__(self, file: BinaryIO, source_language: str) -> None:
        self._file = file
        self._source_language = source_language
        self.nulls = 0
        """Number of texts that were replaced by null."""
        self.left_out = 0
        """Number of rows that were left out."""

    def write(self, row: LintRow, findings: Sequence[Finding]) -> None:
        """Write a row.

        Args:
            row: The row.
            findings: Its findings.

        Raises:
            UserError: A column has a value that JSON has no form for.
        """
        errors = [finding for finding in findings if finding.severity == "error"]
        if any(error.language == self._source_language for error in errors):
            self.left_out += 1
            return
        assert row.original is not None
        fixed = row.original
        prompts = {error.language for error in errors if error.part == "prompt"}
        responses = {error.language for error in errors} - prompts
        for language in (*sorted(prompts), *sorted(responses)):
            fixed = without(fixed, language, response_only=language in responses)
        self.nulls += len(prompts) + len(responses)
        self._file.write(json_line(fixed, row.where))


@contextmanager
def fixed_copy(out: Path, source_language: str) -> Iterator[Fixer]:
    """Open the copy. It appears under its name when the context ends without an error.

    Args:
        out: A file of JSON Lines that does not exist.
        source_language: Canonical code of the source language.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with whole_file(out) as file:
            yield Fixer(file, source_language)
    except OSError as error:
        raise cannot_write("--out", out, error) from error
