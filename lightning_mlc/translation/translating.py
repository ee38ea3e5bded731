"""A translation from beginning to end: read, translate, check, write.

Everything that can be wrong with what the user gave is reported before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_mlc.data.languages import canonical_language
from lightning_mlc.data.reading import locate
from lightning_mlc.data.records import Message
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.api_keys import host_of
from lightning_mlc.files.atomic import UNFINISHED, whole_file
from lightning_mlc.progress.bars import say, track
from lightning_mlc.translation.backends.roster import make_backend, system_of
from lightning_mlc.translation.destination import destination
from lightning_mlc.translation.failures import checked, prepare_checks
from lightning_mlc.translation.journal import TranslationJournal, journal_path
from lightning_mlc.translation.languages import Language, language_of, redone, targets
from lightning_mlc.translation.plan import Plan, PlannedRow
from lightning_mlc.translation.report import Report
from lightning_mlc.translation.rows import SourceRow
from lightning_mlc.translation.settings import TranslationSettings
from lightning_mlc.translation.texts import Text
from lightning_mlc.translation.verification import chrf, require_sacrebleu


class Translation:
    """The work to do, and where its result goes.

    Args:
        settings: The options.
        console: Where progress is shown.

    Raises:
        UserError: An option, the data or the model cannot be used.
    """

    def __init__(self, settings: TranslationSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        source = canonical_language(settings.source_language, "source_language")
        self.source = language_of(source)
        self.targets = targets(settings.languages, source)
        self.redo = redone(settings.redo, self.targets)
        self.out = Path(settings.out)
        _require_out(self.out, settings.file)
        prepare_checks()
        if settings.verify is not None:
            require_sacrebleu()
        self.system = system_of(settings)
        self.plan = Plan.read(
            settings.file, self.source, self.targets, settings.system, settings.only_missing, self.redo
        )
        prompts = f"{len(self.plan.rows)} prompts"
        back = "" if settings.verify is None else ", and as many back"
        where = destination(settings.model, prompts, settings.allow_remote)
        say(f"{prompts}, {self.plan.pairs} translations{back}: {where}")
        self.backend = make_backend(settings)

    def run(self) -> Report:
        """Translate the texts that are not translated yet, and write the file.

        Raises:
            UserError: The journal cannot be used, the disk is full, or an endpoint did not answer everything. What
                came is kept.
        """
        languages = [target.code for target in self.targets]
        settings = {"backend": self.backend.name, **self.backend.settings}
        with (
            closing(self.backend),
            TranslationJournal(journal_path(self.out), settings) as journal,
        ):
            journal.require_data(self.plan.ids())
            for left in self.out.parent.glob(f".{self.out.name}.*{UNFINISHED}"):  # by a process that was killed
                left.unlink(missing_ok=True)
            journal.begin_rounds(self.redo)
            texts = self.plan.texts()
            self._translate(journal, texts, "translating")
            if self.settings.verify is not None:
                back = dict.fromkeys(text for text in map(journal.back, texts) if text is not None)
                self._translate(journal, list(back), "translating back")
            report = self._write(journal)
            journal.end_rounds(languages)
        return report

    def _translate(self, journal: TranslationJournal, texts: Sequence[Text], title: str) -> None:
        self._attempt(journal, texts, title, 1)
        failed = [text for text in texts if journal.needs_second(text)]
        self._attempt(journal, failed, f"{title}, second attempt", 2)

    def _attempt(self, journal: TranslationJournal, texts: Sequence[Text], title: str, attempt: int) -> None:
        journal.attempt = attempt
        done: Collection[int] = {index for index, text in enumerate(texts) if journal.has(journal.job(text))}
        with track(title, len(texts), "texts", done=len(done), console=self.console) as progress:
            for index, reply in self.backend.translate(texts, attempt, done):
                text = texts[index]
                journal.add(journal.job(text), journal.result(text, checked(text, reply)))
                progress.advance()

    # ---- the result ---------------------------------------------------------------------------------

    def _write(self, journal: TranslationJournal) -> Report:
        report = Report([target.code for target in self.targets])
        try:
            with whole_file(self.out) as file:
                file.writelines(self._lines(journal, report))
        except OSError as error:
            raise UserError(
                "out",
                f"cannot write {self.out} ({error.strerror}); all translations are kept, so run the same command again",
            ) from error
        return report

    def _lines(self, journal: TranslationJournal, report: Report) -> Iterator[bytes]:
        """The lines of the file."""
        for planned, row in self.plan.reread():
            prompts: dict[str, Sequence[Message] | None] = dict(row.prompts)
            provenance: dict[str, Any] = {}
            report.kept.update({target.code for target in self.targets} - {own.code for own in planned.languages})
            for language in planned.languages:
                translated, provenance[language.code] = self._translated(journal, planned, row, language, report)
                prompts[language.code] = translated
            yield row.as_line(prompts, provenance)

    def _translated(
        self, journal: TranslationJournal, planned: PlannedRow, row: SourceRow, language: Language, report: Report
    ) -> tuple[list[Message] | None, dict[str, Any]]:
        """The prompt of ``row`` in ``language``, None if it failed; and the provenance."""
        texts = planned.texts(self.source, language)
        records = [journal.known(text) for text in texts]
        provenance = self._translator(max(record["date"] for record in records))
        failed = next((record["failed"] for record in records if record["failed"] is not None), None)
        score = None
        if failed is not None:
            provenance["failed"] = failed
        elif self.settings.verify is not None:
            score = provenance["chrf"] = self._score(journal, texts)
        report.add(language.code, planned.kind, failed, score, self.settings.verify is not None)
        if failed is not None:
            return None, provenance
        translations = [record["translation"] for record in records]
        return row.translated(self.source.code, self.settings.system, translations), provenance

    def _translator(self, date: str) -> dict[str, Any]:
        if not self.system.is_endpoint:
            return {"translator": self.backend.name, "model": self.system.source.short_name, "date": date}
        model = self.settings.model.partition("#")[2]
        return {"translator": self.backend.name, "model": model, "host": host_of(self.settings.model), "date": date}

    def _score(self, journal: TranslationJournal, texts: Sequence[Text]) -> float | None:
        """chrF of the messages that were translated back; None if that failed."""
        records: list[Mapping[str, Any]] = [
            journal.known(back) for back in map(journal.back, texts) if back is not None
        ]
        if any(record["translation"] is None for record in records):
            return None
        return chrf([text.content for text in texts], [record["translation"] for record in records])


def _require_out(out: Path, file: str) -> None:
    """Refuse a place that cannot be written, or must not be, before any work.

    Raises:
        UserError: It is a folder, not a JSONL file, the data itself, or a file that no translation wrote.
    """
    if out.suffix.lower() != ".jsonl":
        raise UserError("out", f"must be a .jsonl file, got {out}; training reads any layout from one")
    if out.is_dir():
        raise UserError("out", f"{out} is a folder; give a file")
    location = locate(file, "file")
    if location is not None and out.resolve() == location.resolve():
        raise UserError("out", f"{out} is the data itself; give another file")
    if out.exists() and not journal_path(out).exists():
        raise UserError("out", f"{out} exists, and no translation wrote it; give another file")
