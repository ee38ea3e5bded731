"""Results on disk as they come: one JSON object a line, appended, under the settings that they came from.

A journal is two files. ``NAME.jsonl`` holds nothing but records. ``NAME.settings.json`` holds what the records
depend on; a journal that was begun with other settings is refused, so results of two settings are never mixed.
Each record also says what it answers: where it belongs, and a digest of its input.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lightning_mlc.errors import UserError, shortened, some_of


class Key(NamedTuple):
    """Where a result belongs: one prompt in one language."""

    set: str
    """Name of the prompt set."""
    id: str
    """The prompt's id in its set."""
    language: str
    """BCP-47 code."""


class Job(NamedTuple):
    """Something to be answered."""

    key: Key
    input: str
    """Digest of all that the answer depends on beside the settings."""


def digest(*parts: Any) -> str:
    """A short digest of ``parts``, plain JSON values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:20]


class Journal:
    """A file of records that survives being killed at any time.

    Open it with ``with``. Records that a killed process had begun to write are dropped, all others are there.

    Args:
        path: ``.../NAME.jsonl``.
        settings: What every record depends on: plain JSON values.

    Raises:
        UserError: On entering: the journal was begun with other settings, is damaged, or is in use.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as they will be read again
        self.records: dict[Key, dict[str, Any]] = {}
        self._file: Any = None

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise UserError("out", f"cannot write {self.path} ({error.strerror}); give another --out") from error
        try:
            self._lock()
            self._claim()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks there
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "out", f"another process is writing {self.path}; wait for it, or give another --out"
            ) from error

    def _claim(self) -> None:
        """Compare the settings with those that the journal was begun with, or note them."""
        beside = self.path.with_suffix(".settings.json")
        if self.path.stat().st_size:
            try:
                begun = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(
                    "out",
                    f"{beside} cannot be read, so nobody knows how {self.path.name} was made; "
                    "give another --out, or remove both",
                ) from error
            if not isinstance(begun, dict):
                raise UserError("out", f"{beside} is damaged; give another --out, or remove it and {self.path.name}")
            if begun != self.settings:
                raise UserError(
                    "out",
                    f"{self.path} was made with other settings ({_difference(begun, self.settings)}); "
                    "give another --out, or the settings of that run",
                )
            return
        write_whole(beside, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n"), start=1):
            if not line:
                continue
            try:
                record = json.loads(line)
                _ = record["input"]
                self.records[Key(record["set"], record["id"], record["language"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    "out", f"{self.path} line {number} is damaged; remove that line, or the file"
                ) from error
        if whole < len(data):  # the process was killed while it wrote
            self._file.truncate(whole)

    def has(self, job: Job) -> bool:
        """Whether there is a record for ``job``.

        Raises:
            UserError: There is one, but of another input: the prompts have changed since.
        """
        record = self.records.get(job.key)
        if record is not None and record["input"] != job.input:
            raise UserError(
                "out",
                f"{self.path} has a result for '{shortened(job.key.id, 30)}' ({job.key.language}) of the set "
                f"'{shortened(job.key.set, 30)}' "
                "from another text; the data has changed since, so give another --out",
            )
        return record is not None

    def add(self, job: Job, result: Mapping[str, Any]) -> None:
        """Append the ``result`` of ``job``; it is on its way to the disk when this returns."""
        record = {**job.key._asdict(), "input": job.input, **result}
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.records[job.key] = record


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    unfinished = path.with_name(
        f".{path.name}.{os.getpid()}.unfinished"
    )  # processes of a study write some files at once
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings changed, and how: as much as a line has room for."""
    changed = [key for key in {**begun, **now} if begun.get(key) != now.get(key)]
    return some_of([f"{key}: {_brief(begun.get(key))} there, {_brief(now.get(key))} here" for key in changed], 120)


def _brief(value: Any) -> str:
    return shortened(str(value), 40)
