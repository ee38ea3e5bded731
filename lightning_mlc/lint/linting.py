"""Check whole files: read twice, row by row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from lightning_mlc.data.garbage import without_old_objects
from lightning_mlc.errors import UserError, did_you_mean
from lightning_mlc.lint.check import Check, LintSettings
from lightning_mlc.lint.checks import all_checks
from lightning_mlc.lint.findings import Finding, RowFinding, Severity
from lightning_mlc.lint.rows import LintRow, read
from lightning_mlc.progress.bars import track


@dataclass
class Report:
    """The findings in some files."""

    files: tuple[str, ...]
    """Paths, as the user gave them."""
    source_language: str
    checks: tuple[Check, ...]
    """Those that were run."""
    rows: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    """Number of prompts and responses by language, the source language first."""
    of_rows: list[RowFinding] = field(default_factory=list)
    """Findings in rows, in their order."""
    of_columns: list[Finding] = field(default_factory=list)

    def counts(self) -> Counter[tuple[str, str]]:
        """Number of findings by check and language."""
        findings = chain((found.finding for found in self.of_rows), self.of_columns)
        return Counter((finding.check, finding.language) for finding in findings)

    def total(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        names = {check.name for check in self.checks if check.severity == severity}
        return sum(count for (check, _), count in self.counts().items() if check in names)


def choose_checks(settings: LintSettings, only: Sequence[str] = (), skip: Sequence[str] = ()) -> tuple[Check, ...]:
    """Make the checks of a run.

    Args:
        settings: What checks depend on.
        only: Names of the checks to run; empty for all.
        skip: Names of checks to leave out.

    Raises:
        UserError: A name is unknown, no check is left, or a package or model that a check needs is missing.
    """
    known = all_checks()
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                near = did_you_mean(name, list(known), f"; choose from {', '.join(known)}")
                raise UserError(option, f"there is no check '{name}'{near}")
    is_on = {kind.name: kind.option is None or settings.gives(kind.option) for kind in known.values()}
    for name in only:
        if not is_on[name]:
            raise UserError("--only", f"the check '{name}' needs {known[name].option}; give it as well")
    chosen = [kind for name, kind in known.items() if is_on[name] and name not in skip and (not only or name in only)]
    if not chosen:
        raise UserError("--skip", "leaves no check; skip fewer")
    for kind in chosen:
        kind.require_packages()
    return tuple(kind.made(settings) for kind in chosen)


Watcher = Callable[[int, LintRow, Sequence[Finding]], None]
"""Called for every row, with the index of its file, the row and its findings."""


def lint(files: Sequence[str], source_language: str, checks: Sequence[Check], watch: Watcher | None = None) -> Report:
    """Check ``files`` together. Rows are read one by one; only statistics, hashes and findings stay in memory.

    Args:
        files: Paths, as of :func:`~lightning_mlc.data.reading.read_rows`.
        source_language: Canonical code of the source language.
        checks: From :func:`choose_checks`. They keep statistics, so each run needs new ones.
        watch: Is called for each row.

    Raises:
        UserError: A file or a row cannot be read.
    """
    report = Report(tuple(files), source_language, tuple(checks))
    report.texts[source_language] = 0
    learning = [check for check in checks if check.learns()]
    with without_old_objects():
        for number, row in _rows(files, source_language, "reading") if learning else ():
            for check in learning:
                check.learn(number, row)
        for number, row in _rows(files, source_language, "checking"):
            found = [finding for check in checks for finding in check.check(number, row)]
            report.rows += 1
            report.texts.update(pair.text.language for pair in row.pairs)
            report.of_rows += [RowFinding(files[number], row.where.number, row.id, finding) for finding in found]
            if watch is not None:
                watch(number, row, found)
    report.of_columns += [finding for check in checks for finding in check.columns()]
    return report


def _rows(files: Sequence[str], source_language: str, doing: str) -> Iterator[tuple[int, LintRow]]:
    """The rows of all files, each with the index of its file."""
    for number, file in enumerate(files):
        with track(f"{doing} {Path(file).name}", math.inf, "rows") as work:
            for row in work.each(read(file, source_language)):
                yield number, row
