"""Plant faults into data and count which of them are found."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lint.faults import FAULTS, LINK, Place, Texts
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.linting import Report, choose_checks, lint
from lightning_mlc.lint.rows import read

SHARE = 0.1
"""Share of the sources that get a link."""
SEED = 0
COLUMN = "sw"
"""The column that faults of whole columns are planted in."""

Rows = list[dict[str, str]]
Key = tuple[int, str]
"""Number of a row, counted from 1, and a language."""


def good_rows(path: str, source: str) -> tuple[Rows, list[str | None]]:
    """Prompts by language, and kind, of each row of a file."""
    rows = list(read(path, source))
    texts = [{pair.text.language: pair.text.content for pair in row.pairs if pair.part == "prompt"} for row in rows]
    return texts, [row.kind for row in rows]


def without_findings(rows: Rows, source: str) -> Rows:
    """The rows without the translations that an error is found in: faults are planted into good ones."""
    bad = {
        (found.row, found.finding.language)
        for found in checked(rows, source).of_rows
        if found.finding.severity == "error"
    }
    return [
        {code: text for code, text in row.items() if (number, code) not in bad}
        for number, row in enumerate(rows, start=1)
    ]


def checked(
    rows: Sequence[Texts], source: str, other: Sequence[Texts] | None = None, kinds: Sequence[str | None] = ()
) -> Report:
    """Run all checks on rows, which are written to a folder that is then removed; ``other`` is a second file."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, part in (("first", rows), ("second", other)):
            if part is not None:
                path = Path(folder) / f"{name}.jsonl"
                of_kind = list(kinds) or [None] * len(part)
                lines = [
                    json.dumps({"prompt": row, **({"kind": kind} if kind else {})})
                    for row, kind in zip(part, of_kind, strict=False)
                ]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                files.append(str(path))
        return lint(files, source, choose_checks(LintSettings(source, tuple(files))))


def planted(rows: Rows, check: str, source: str) -> tuple[Rows, set[Key]]:
    """Rows in which some texts have the fault that ``check`` should find, and which.

    One text of every second row gets it, so that no two faults meet in a row or in neighbouring rows.
    """
    chance = random.Random(SEED)
    made: Rows = []
    where: set[Key] = set()
    for number, row in enumerate(rows, start=1):
        changed = dict(row)
        languages = [code for code in row if code != source] if number % 2 == 0 else []
        chance.shuffle(languages)
        for language in languages:
            place = Place(row, rows[number - 2], source, language, chance)
            if (text := FAULTS[check](place)) is not None and text != row[language]:
                changed[language] = text
                where.add((number, language))
                break
        made.append(changed)
    return made, where


def with_lost_links(rows: Rows, source: str) -> tuple[Rows, set[Key]]:
    """A link in one in ten sources, which no translation has."""
    chance = random.Random(SEED)
    changed = {number for number in range(1, len(rows) + 1) if chance.random() < SHARE}
    made = [
        {**row, source: row[source] + LINK} if number in changed else row for number, row in enumerate(rows, start=1)
    ]
    return made, {(number, code) for number in changed for code in rows[number - 1] if code != source}


def of_check(report: Report, check: str) -> set[Key]:
    """Where ``check`` found something."""
    return {(found.row, found.finding.language) for found in report.of_rows if found.finding.check == check}


def score(found: set[Key], where: set[Key], before: set[Key]) -> dict[str, float | int | None]:
    """Precision and recall.

    Args:
        found: Where the check found something.
        where: Where a fault was planted.
        before: Where it found something in the good rows.
    """
    hits = len(found & where)
    more = len(found - where - before)
    return {
        "planted": len(where),
        "found": hits,
        "recall": round(hits / len(where), 4) if where else None,
        "elsewhere": more,
        "precision": round(hits / (hits + more), 4) if hits + more else None,
    }


def measure(path: str, source: str) -> dict[str, Any]:
    """False alarms on a file as it is, and precision and recall of each check on faults planted into it."""
    rows, kinds = good_rows(path, source)
    as_it_is = checked(rows, source, kinds=kinds)
    alarms: dict[str, dict[str, int]] = {}
    for (check, language), count in sorted(as_it_is.counts().items()):
        alarms.setdefault(check, {})[language] = count
    good = without_findings(rows, source)
    clean = checked(good, source)
    scores: dict[str, Mapping[str, Any]] = {}
    for check in FAULTS:
        made, where = planted(good, check, source)
        if check == "same_text":  # both texts are found, and no check can know which one was planted
            report = checked(made, source)
            partners = {
                (row, other)
                for row, code in where
                for other in good[row - 1]
                if good[row - 1][other] == made[row - 1][code]
            }
            scores[check] = score(of_check(report, check) - partners, where, of_check(clean, check))
        else:
            scores[check] = score(of_check(checked(made, source), check), where, of_check(clean, check))
    made, where = with_lost_links(good, source)
    scores["placeholders"] = score(
        of_check(checked(made, source), "placeholders"), where, of_check(clean, "placeholders")
    )
    scores |= _of_columns(good, kinds, source)
    return {
        "rows": len(rows),
        "texts": sum(len(row) for row in rows),
        "found_as_it_is": alarms,
        "planted": scores,
    }


def _of_columns(rows: Rows, kinds: Sequence[str | None], source: str) -> dict[str, Mapping[str, Any]]:
    """Faults of a whole column and of two files."""
    third = [row if number % 3 == 0 else {**row, COLUMN: None} for number, row in enumerate(rows)]
    kinds = [kind or ("harmful" if number % 2 else "ordinary") for number, kind in enumerate(kinds)]
    harmful = [{**row, COLUMN: None} if kind == "harmful" else row for row, kind in zip(rows, kinds, strict=True)]
    scores: dict[str, Mapping[str, Any]] = {}
    for check, made in (("few_rows", third), ("unequal", harmful)):
        kept = [{code: text for code, text in row.items() if text is not None} for row in made]
        report = checked(kept, source, kinds=kinds)
        found = {(0, finding.language) for finding in report.of_columns if finding.check == check}
        scores[check] = score(found, {(0, COLUMN)}, set())
    half = len(rows) // 2
    second = [
        {source: f"Row {number}.", **{code: row[code] for code in row if code != source}}
        for number, row in enumerate(rows[:half:5])
    ]
    report = checked(rows[:half], source, rows[half:] + second)
    found = of_check(report, "overlap")
    first = len(rows) - half + 1
    letters = {(first + number, code) for number, row in enumerate(second) for code in row if code != source}
    clean = of_check(checked(rows[:half], source, rows[half:]), "overlap")
    scores["overlap"] = score(found, letters, clean)
    return scores
