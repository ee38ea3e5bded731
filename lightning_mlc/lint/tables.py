"""A report on the terminal: counts by check and language, then rows. No text of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mlc.errors import shortened
from lightning_mlc.lint.findings import RowFinding
from lightning_mlc.lint.linting import Report

SHOWN = 20
"""Rows that are listed, unless the user asks for more."""


def show(report: Report, console: Console, rows: int = SHOWN) -> None:
    """Print a report.

    Args:
        report: The report.
        console: Where to.
        rows: Most findings in rows that are listed; 0 for all.
    """
    counts = report.counts()
    texts = sum(report.texts.values())
    console.print(
        f"{report.rows:,} rows, {texts:,} texts, {len(report.texts)} languages, {len(report.checks)} checks; "
        f"errors: {report.total('error'):,}, warnings: {report.total('warning'):,}",
        highlight=False,
    )
    if list(report.texts) == [report.source_language] and report.rows:
        console.print(
            f"only '{report.source_language}' is there, so no translation was checked; "
            "`lightning-mlc translate` makes translations",
            soft_wrap=True,
            highlight=False,
        )
    for severity in ("error", "warning"):
        found = [check for check in report.checks if check.severity == severity and _of(check.name, counts)]
        if found:
            console.print()
            console.print(_table(severity, found, report))
    for line in lines(report, rows):
        console.file.write(f"{line}\n")
    console.file.flush()


def _of(check: str, counts: dict[tuple[str, str], int]) -> int:
    return sum(count for (name, _), count in counts.items() if name == check)


def _table(severity: str, checks: Sequence[object], report: Report) -> Table:
    counts = report.counts()
    names = [check.name for check in report.checks if check in checks]
    languages = [code for code in report.texts if any(counts[name, code] for name in names)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{severity}s")
    for language in (*languages, "all"):
        table.add_column(Text(language), justify="right")
    for name in names:
        row = [counts[name, language] for language in languages]
        table.add_row(name, *(str(count) if count else "·" for count in row), str(sum(row)))
    return table


def lines(report: Report, rows: int) -> Iterator[str]:
    """One line for each finding: those of columns, then at most ``rows`` of rows (0: all), errors first."""
    if report.of_columns:
        yield ""
        yield "columns"
        for finding in report.of_columns:
            yield f"  {finding.language}: {finding.check} ({finding.note})"
    ordered = sorted(report.of_rows, key=lambda found: found.finding.severity)
    shown = ordered[:rows] if rows else ordered
    if shown:
        yield ""
        yield "rows"
    for found in shown:
        yield f"  {_place(found)} {found.finding.language}: {found.finding.check} ({found.finding.note})"
    if left := len(ordered) - len(shown):
        yield f"  and {left:,} more; --rows 0 shows all, --json FILE writes them"


def _place(found: RowFinding) -> str:
    # An id is data: it must not move the cursor, nor fill the screen.
    id = "".join(character if character.isprintable() else "?" for character in shortened(found.id, 40))
    named = "" if found.id.endswith(f" row {found.row}") else f" ({id})"
    part = "" if found.finding.part == "prompt" else f" {found.finding.part}"
    return f"{found.file} row {found.row}{named}{part}"
