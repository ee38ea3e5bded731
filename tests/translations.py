"""What tests of checks share: rows by hand, and what one check finds in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_mlc.data.records import Place
from lightning_mlc.lint.check import LintSettings, TextCheck
from lightning_mlc.lint.checks import all_checks
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.linting import choose_checks
from lightning_mlc.lint.rows import LintRow, Pair, lint_row
from lightning_mlc.lint.texts import Text


def fault(check: str, source: str, text: str, language: str, source_language: str = "en") -> str | None:
    """What ``check`` says of one translation."""
    kind = all_checks()[check]
    assert issubclass(kind, TextCheck)
    return kind.made(LintSettings()).fault(Pair(Text(source, source_language), Text(text, language)))


def fault_of_source(check: str, text: str, language: str = "en") -> str | None:
    """What ``check`` says of a text of the source language."""
    kind = all_checks()[check]
    assert issubclass(kind, TextCheck)
    own = Text(text, language)
    return kind.made(LintSettings()).fault(Pair(own, own))


def row(number: int, texts: Mapping[str, str], kind: str | None = None, source_language: str = "en") -> LintRow:
    """A row of prompts by language."""
    prompts = {language: [{"role": "user", "content": text}] for language, text in texts.items()}
    return lint_row(Place("hand.jsonl", number), f"row {number}", prompts, source_language, {}, kind)


def found(check: str, rows: Sequence[LintRow], files: Sequence[int] | None = None) -> list[tuple[int, Finding]]:
    """What ``check`` finds in ``rows`` (with their numbers; 0: a column), which are of ``files`` (all of the first)."""
    of_file = [0] * len(rows) if files is None else list(files)
    names = tuple(f"file{number}.jsonl" for number in range(max(of_file) + 1))
    (made,) = choose_checks(LintSettings("en", names), only=[check])
    for file, one in zip(of_file, rows, strict=True):
        made.learn(file, one)
    in_rows = [
        (one.where.number, finding)
        for file, one in zip(of_file, rows, strict=True)
        for finding in made.check(file, one)
    ]
    return [*in_rows, *((0, finding) for finding in made.columns())]


def places(check: str, rows: Sequence[LintRow], files: Sequence[int] | None = None) -> list[tuple[int, str]]:
    """Row and language of all that ``check`` finds."""
    return [(number, finding.language) for number, finding in found(check, rows, files)]
