"""The plan of a translation: which rows lack which languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_mlc.data.records import Place
from lightning_mlc.errors import UserError
from lightning_mlc.translation.languages import Language
from lightning_mlc.translation.rows import SourceRow, read_source
from lightning_mlc.translation.texts import Text, text_id


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row with the languages that it is translated into."""

    where: Place
    kind: str
    turns: tuple[str, ...]
    """Its messages that are translated, in the source language."""
    languages: tuple[Language, ...]

    def texts(self, source: Language, language: Language) -> list[Text]:
        """Its messages, to be translated into ``language``."""
        return [Text(turn, source, language) for turn in self.turns]


@dataclass(frozen=True)
class Plan:
    """All rows of the data, and which of their texts are translated.

    Args:
        path: The data, as the user gave it.
        source: The language that is translated from.
        system: Whether system messages are translated, too.
        rows: Its rows, in order.
    """

    path: str
    source: Language
    system: bool
    rows: Sequence[PlannedRow]

    @classmethod
    def read(
        cls,
        path: str,
        source: Language,
        targets: Sequence[Language],
        system: bool,
        only_missing: bool,
        redo: Iterable[str],
    ) -> Plan:
        """Read the data.

        Args:
            path: The data.
            source: The language to translate from.
            targets: The languages to translate into.
            system: Whether system messages are translated, too.
            only_missing: Whether translations that the data has are kept.
            redo: Codes of languages whose translations are replaced.

        Raises:
            UserError: A row cannot be read; or the data has translations, and nobody says what becomes of them.
        """
        again = frozenset(redo)
        there: Counter[str] = Counter()
        rows = []
        for row in read_source(path, source.code):
            row.as_line(row.prompts, {})  # a value that cannot be written is reported before any work
            there.update(row.prompts.keys())
            wanted = tuple(one for one in targets if one.code not in row.prompts or one.code in again)
            rows.append(PlannedRow(row.where, row.kind, tuple(row.turns(source.code, system)), wanted))
        for code in (target.code for target in targets):
            if there[code] and not only_missing and code not in again:
                raise UserError(
                    "languages",
                    f"{path} has {there[code]} prompts in '{code}' already; give --only_missing to keep them, "
                    f"or --redo {code} to translate them again",
                )
        return cls(path, source, system, tuple(rows))

    @property
    def pairs(self) -> int:
        """Number of translations of prompts."""
        return sum(len(row.languages) for row in self.rows)

    def texts(self) -> list[Text]:
        """Every message in every language that it is translated into, each once."""
        return list(
            dict.fromkeys(
                text for row in self.rows for language in row.languages for text in row.texts(self.source, language)
            )
        )

    def ids(self) -> set[str]:
        """Ids of all messages, whether they are translated or not."""
        return {text_id(turn, self.source.code) for row in self.rows for turn in row.turns}

    def reread(self) -> Iterator[tuple[PlannedRow, SourceRow]]:
        """The rows once more, with all their columns.

        Raises:
            UserError: The data has changed since.
        """
        changed = UserError("file", f"{self.path} changed while it was translated; run the same command again")
        planned = iter(self.rows)
        for row in read_source(self.path, self.source.code):
            own = next(planned, None)
            if own is None or list(own.turns) != row.turns(self.source.code, self.system):
                raise changed
            yield own, row
        if next(planned, None) is not None:
            raise changed
