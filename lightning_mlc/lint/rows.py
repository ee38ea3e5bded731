"""Rows of a file as checks see them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_mlc.data.file_layouts import id_of, pair_of, prompts_of_rows, require_source
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import PAIR, Message, Place, Row
from lightning_mlc.lint.findings import Part
from lightning_mlc.lint.texts import Text


class Pair(NamedTuple):
    """A translation and the text that it is made from."""

    source: Text
    text: Text
    part: Part = "prompt"

    @property
    def is_source(self) -> bool:
        """Whether this is the source text itself, which is compared with itself."""
        return self.source is self.text


@dataclass(frozen=True)
class LintRow:
    """The texts of one row."""

    where: Place
    """File and row."""
    id: str
    """The row's id, or its place."""
    pairs: tuple[Pair, ...]
    """The source prompt, paired with itself, then all translations."""
    kind: str | None = None
    """``harmful`` or ``ordinary``, if the row says so."""
    original: Row | None = None
    """The row as the file has it."""

    @property
    def source(self) -> Text:
        """The prompt in the source language."""
        return self.pairs[0].source

    @property
    def prompts(self) -> Iterator[Pair]:
        """The translations of the prompt."""
        return (pair for pair in self.pairs[1:] if pair.part == "prompt")


def lint_row(
    where: Place,
    id: str,
    prompts: Mapping[str, Sequence[Message]],
    source_language: str,
    responses: Mapping[str, tuple[str, str]],
    kind: str | None = None,
    original: Row | None = None,
) -> LintRow:
    """Make a row from its conversations.

    Args:
        where: File and row.
        id: Its id.
        prompts: Conversations by language, the source language among them. The messages of the system are left out.
        source_language: Code of the source language.
        responses: Chosen and rejected response by language; in the source language and others, or empty.
        kind: ``harmful``, ``ordinary`` or None.
        original: The row as the file has it.
    """
    source = _joined(prompts[source_language], source_language)
    pairs = [Pair(source, source)]
    pairs += [Pair(source, _joined(text, code)) for code, text in prompts.items() if code != source_language]
    if source_language in responses:
        sources = [Text(text, source_language) for text in responses[source_language]]
        for language, texts in responses.items():
            if language != source_language:
                chosen, rejected = (Text(text, language) for text in texts)
                pairs += [Pair(sources[0], chosen, "chosen"), Pair(sources[1], rejected, "rejected")]
    return LintRow(where, id, tuple(pairs), kind, original)


def _joined(messages: Sequence[Message], language: str) -> Text:
    return Text("\n".join(turn["content"] for turn in messages if turn["role"] != "system"), language)


def read(path: str, source_language: str, option: str = "FILE") -> Iterator[LintRow]:
    """Read the rows of a data source in any layout. Texts that training refuses are read, too.

    Args:
        path: As of :func:`~lightning_mlc.data.reading.read_rows`.
        source_language: Canonical code of the source language.
        option: Name of the argument, for errors.

    Raises:
        UserError: The source or one of its rows cannot be read.
    """
    for where, row, prompts in prompts_of_rows(read_rows(path, option), source_language, any_text=True):
        require_source(prompts, where, source_language, "--source_language")
        kind = row.get("kind")
        yield lint_row(
            where,
            id_of(row, where),
            prompts,
            source_language,
            _responses(row, prompts, where, source_language),
            kind if isinstance(kind, str) else None,
            row,
        )


def _responses(row: Row, prompts: Collection[str], where: Place, source: str) -> dict[str, tuple[str, str]]:
    """Both responses by language, if they are given by language."""
    if not all(isinstance(row.get(key), Mapping) for key in PAIR):
        return {}
    chosen, rejected, translated = pair_of(row, prompts, where, source, any_text=True)
    return {source: (chosen, rejected), **translated}
