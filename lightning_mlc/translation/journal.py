"""The journal of a translation: a line for each text, language and settings, on the disk before the next one begins."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import Job, Journal, Key, digest
from lightning_mlc.translation.texts import Reply, Text

_ROUND = "round"
"""The id of records that count how often a language was translated again. Ids of texts are digests."""
FORMAT = 1


def journal_path(out: Path) -> Path:
    """Where the journal of the file ``out`` is."""
    return out.with_name(f"{out.name}.journal.jsonl")


class TranslationJournal(Journal):
    """Attempts to translate texts. The last line of a text and a language counts.

    Translations stay on the disk and are read again when they are needed: in memory is only where their lines begin.
    ``records`` has the rounds alone.

    Its records hold ``translation`` (or null), ``failed`` (the reason, or null), ``attempt``, ``date``, and ``round``,
    which counts how often ``--redo`` has begun the language again: records of earlier rounds do not count.

    Args:
        path: The file.
        settings: Everything that translations depend on, in addition to the texts. A journal can hold translations of
            several settings; only those of these settings count.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(path, {"format": FORMAT})
        self._set = digest(dict(settings))
        self._places: defaultdict[tuple[str, str], dict[bytes, int]] = defaultdict(dict)
        """By settings and language: where the line of a text begins, by the bytes of its id."""
        self.attempt = 1
        """The attempt that :meth:`has` asks for."""

    def job(self, text: Text) -> Job:
        """The translation of ``text``, as the journal names it."""
        return Job(Key(self._set, text.id, text.target.code), text.id)

    def has(self, job: Job) -> bool:
        """Whether the current attempt at ``job`` was made, or is not needed because an earlier one succeeded."""
        record = self._current(job)
        return record is not None and (record["failed"] is None or record["attempt"] >= self.attempt)

    def needs_second(self, text: Text) -> bool:
        """Whether the first attempt at ``text`` failed, whatever came of a second one."""
        record = self._current(self.job(text))
        return record is not None and (record["failed"] is not None or record["attempt"] > 1)

    def known(self, text: Text) -> Mapping[str, Any]:
        """The record of the last attempt at ``text``, which was made."""
        record = self._current(self.job(text))
        assert record is not None
        return record

    def back(self, text: Text) -> Text | None:
        """The translation of ``text``, to be translated back; None if it failed."""
        translation = self.known(text)["translation"]
        return None if translation is None else Text(translation, text.target, text.source)

    def _current(self, job: Job) -> dict[str, Any] | None:
        place = self._places[job.key.set, job.key.language].get(bytes.fromhex(job.key.id))
        if place is None:
            return None
        self._file.seek(place)  # lines are appended wherever the file was read
        record: dict[str, Any] = json.loads(self._file.readline())
        return record if record["round"] == self._round(job.key.language)[0] else None

    def _keep(self, key: Key, record: dict[str, Any]) -> None:
        if key.id == _ROUND:
            super()._keep(key, record)
        else:
            self._places[key.set, key.language][bytes.fromhex(key.id)] = self._size

    def result(self, text: Text, reply: Reply) -> dict[str, Any]:
        """What :meth:`add` writes of a reply to ``text`` in the current attempt."""
        return {
            "translation": reply.translation,
            "failed": reply.failed,
            "attempt": self.attempt,
            "round": self._round(text.target.code)[0],
            "date": datetime.now(UTC).date().isoformat(),
        }

    def add(self, job: Job, result: Mapping[str, Any]) -> None:
        """Append the ``result`` of ``job``; it is on the disk when this returns."""
        super().add(job, result)
        with self._writing():
            os.fsync(self._file.fileno())

    # ---- rounds -------------------------------------------------------------------------------------

    def _round(self, language: str) -> tuple[int, bool]:
        """Number of the current round of a language, and whether it is complete."""
        record = self.records.get(Key(self._set, _ROUND, language))
        return (0, True) if record is None else (record["round"], record["complete"])

    def begin_rounds(self, languages: Iterable[str]) -> None:
        """Begin a new round of ``languages``. An incomplete round is continued."""
        for language in sorted(languages):
            number, complete = self._round(language)
            if complete:
                self._note_round(language, number + 1, False)

    def end_rounds(self, languages: Iterable[str]) -> None:
        """The rounds of ``languages`` are complete."""
        for language in sorted(languages):
            number, complete = self._round(language)
            if not complete:
                self._note_round(language, number, True)

    def _note_round(self, language: str, number: int, complete: bool) -> None:
        self.add(Job(Key(self._set, _ROUND, language), ""), {"round": number, "complete": complete})

    # ---- other data ---------------------------------------------------------------------------------

    def require_data(self, ids: Collection[str]) -> None:
        """Refuse a journal of other data.

        Args:
            ids: Ids of all texts of the data.

        Raises:
            UserError: The journal has texts, and none is of this data.
        """
        asked = {bytes.fromhex(id) for id in ids}
        if any(self._places.values()) and all(asked.isdisjoint(own) for own in self._places.values()):
            raise UserError(
                "out", f"{self.path} is the journal of other data; give another --out, or remove the journal"
            )
