"""The report on the terminal."""

from __future__ import annotations

from lightning_mlc.lint.findings import Finding, RowFinding
from lightning_mlc.lint.linting import Report
from lightning_mlc.lint.tables import lines


def report(*of_rows: RowFinding) -> Report:
    return Report(
        ("a.jsonl",),
        "en",
        (),
        of_rows=list(of_rows),
        of_columns=[Finding("few_rows", "warning", "sw", "in 1 of 9 rows")],
    )


COPY = Finding("copy", "error", "sw", "a copy")
DIGITS = Finding("digits", "warning", "ur", "digits lost", "chosen")


def test_errors_come_first_and_the_rest_is_counted() -> None:
    found = report(
        RowFinding("a.jsonl", 1, "x", DIGITS), *(RowFinding("a.jsonl", n, f"a.jsonl row {n}", COPY) for n in (2, 3))
    )
    assert list(lines(found, 2)) == [
        "",
        "columns",
        "  sw: few_rows (in 1 of 9 rows)",
        "",
        "rows",
        "  a.jsonl row 2 sw: copy (a copy)",
        "  a.jsonl row 3 sw: copy (a copy)",
        "  and 1 more; --rows 0 shows all, --json FILE writes them",
    ]
    assert list(lines(found, 0))[-1] == "  a.jsonl row 1 (x) chosen ur: digits (digits lost)"


def test_an_id_cannot_steer_the_terminal() -> None:
    (line,) = list(lines(report(RowFinding("a.jsonl", 1, "\x1b[2J\n" + "y" * 99, COPY)), 0))[5:]
    assert "\x1b" not in line
    assert "\n" not in line
    assert len(line) < 90
