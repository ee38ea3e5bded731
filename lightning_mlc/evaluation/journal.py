"""Results on disk: one JSON object per line, appended as soon as it is computed.

A journal consists of two files. ``NAME.jsonl`` holds the records. ``NAME.settings.json`` holds the settings that the
records depend on. A journal that was started with other settings is refused, so that results of different settings are
never mixed. Each record also names its prompt, and has a digest of its input.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lightning_mlc.errors import UserError, shortened, some_of
from lightning_mlc.files.atomic import write_whole


class Key(NamedTuple):
    """Identifies a result: one prompt in one language."""

    set: str
    """Name of the prompt set."""
    id: str
    """The prompt's id in its set."""
    language: str
    """BCP-47 code."""


class Job(NamedTuple):
    """One result to compute."""

    key: Key
    input: str
    """Digest of everything that the result depends on in addition to the settings."""


def digest(*parts: Any) -> str:
    """A short digest of ``parts``, which are plain JSON values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:20]


class Journal:
    """A file of records that stays valid when the process is killed.

    Open it with ``with``. A record that a killed process did not finish writing is dropped. All others are kept.

    Args:
        path: ``.../NAME.jsonl``.
        settings: The settings that every record depends on, as plain JSON values.

    Raises:
        UserError: On entering: the journal was started with other settings, is damaged, or is used by another process.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as they are when read from the file
        self.records: dict[Key, dict[str, Any]] = {}
        self._file: Any = None
        self._size = 0
        """Bytes of the lines that were read or written."""

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise UserError("out", f"cannot write {self.path} ({error.strerror}); give another --out") from error
        try:
            self._lock()
            self._check_settings()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._writing():
                self._file.flush()
                os.fsync(self._file.fileno())
        except UserError:
            if error is None:
                raise
        finally:
            with suppress(OSError):  # what could not be written is still in its buffer
                self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "out", f"another process is writing {self.path}; wait until it ends, or give another --out"
            ) from error

    def _check_settings(self) -> None:
        """Compare the settings with those of the journal, or write them if the journal is new."""
        settings_file = self.path.with_suffix(".settings.json")
        if self.path.stat().st_size:
            try:
                begun = json.loads(settings_file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(
                    "out",
                    f"{settings_file} cannot be read, so the settings of {self.path.name} are unknown; "
                    "give another --out, or remove both",
                ) from error
            if not isinstance(begun, dict):
                raise UserError(
                    "out", f"{settings_file} is damaged; give another --out, or remove it and {self.path.name}"
                )
            if begun != self.settings:
                raise UserError(
                    "out",
                    f"{self.path} was made with other settings ({_difference(begun, self.settings)}); "
                    "give another --out, or use the settings of that run",
                )
            return
        with self._writing():
            write_whole(settings_file, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):  # the process was killed while it wrote
                self._file.truncate(self._size)
                break
            if line != b"\n":
                try:
                    record = json.loads(line)
                    _ = record["input"]
                    self._keep(Key(record["set"], record["id"], record["language"]), record)
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        "out", f"{self.path} line {number} is damaged; remove that line, or the file"
                    ) from error
            self._size += len(line)

    def _keep(self, key: Key, record: dict[str, Any]) -> None:
        """Remember a record. Its line begins at byte ``self._size`` of the file."""
        self.records[key] = record

    def has(self, job: Job) -> bool:
        """Whether the journal has a record for ``job``.

        Raises:
            UserError: It has one for another input, because the prompts have changed since.
        """
        record = self.records.get(job.key)
        if record is not None and record["input"] != job.input:
            raise UserError(
                "out",
                f"{self.path} has a result for '{shortened(job.key.id, 30)}' ({job.key.language}) of the set "
                f"'{shortened(job.key.set, 30)}' "
                "that was computed from another text; the data has changed since, so give another --out",
            )
        return record is not None

    def add(self, job: Job, result: Mapping[str, Any]) -> None:
        """Append the ``result`` of ``job``. The operating system has it when this returns.

        Raises:
            UserError: The disk is full, or fails.
        """
        record = {**job.key._asdict(), "input": job.input, **result}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._writing():
            self._file.write(line)
            self._file.flush()
        self._keep(job.key, record)
        self._size += len(line)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                "out",
                f"cannot write {self.path} ({error.strerror}); what is done is kept, so run again once there is room",
            ) from error


def _difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings changed, and how, as far as one line has room for them."""
    changed = [key for key in {**begun, **now} if begun.get(key) != now.get(key)]
    return some_of([f"{key}: {_shown(begun.get(key))} before, {_shown(now.get(key))} now" for key in changed], 120)


def _shown(value: Any) -> str:
    return shortened(str(value), 40)
