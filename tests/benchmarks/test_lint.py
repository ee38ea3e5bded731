"""The benchmark of lint: what is planted, and how it is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.lint.faults import FAULTS
from benchmarks.lint.planting import good_rows, measure, planted, score
from benchmarks.lint.speed import measure_lint, summary
from lightning_mlc.lint.checks import all_checks


def test_each_check_has_a_fault() -> None:
    """The others are planted into columns and sources, or need a model."""
    of_columns = {"few_rows", "overlap", "placeholders", "unequal"}
    assert all_checks().keys() - FAULTS.keys() == of_columns | {"tokens", "meaning", "back_translation", "quality"}
    assert FAULTS.keys() <= all_checks().keys()


@pytest.mark.parametrize("check", FAULTS)
def test_faults_are_planted_where_it_is_said(check: str) -> None:
    rows, _ = good_rows("sample", "en")
    made, where = planted(rows, check, "en")
    differing = {
        (number, code)
        for number, (row, good) in enumerate(zip(made, rows, strict=True), start=1)
        for code in row
        if row[code] != good[code]
    }
    assert differing == where
    assert all(number % 2 == 0 and code != "en" for number, code in where)
    assert planted(rows, check, "en") == (made, where)


def test_precision_and_recall() -> None:
    where = {(2, "sw"), (4, "sw"), (6, "ru"), (8, "ru")}
    found = {(2, "sw"), (4, "sw"), (6, "ru"), (7, "ru"), (9, "ja")}
    assert score(found, where, before={(9, "ja")}) == {
        "planted": 4,
        "found": 3,
        "recall": 0.75,
        "elsewhere": 1,
        "precision": 0.75,
    }


def test_a_summary() -> None:
    cases = [
        {"texts": texts, "texts_per_second": speed, "peak_bytes": 10**8 + 40 * texts}
        for texts, speed in ((1000, 3000), (10_000, 2000), (100_000, 1000))
    ]
    assert summary(cases) == {"texts_per_minute": 60_000, "linearity": 2, "bytes_per_text": 40}


@pytest.mark.slow
def test_a_file_is_measured_and_no_text_is_kept(tmp_path: Path) -> None:
    rows, _ = good_rows("sample", "en")
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": row}) for row in rows[:24]), encoding="utf-8")
    found = measure(str(path), "en")
    assert found["rows"] == 24
    assert all(found["planted"][check]["recall"] == 1 for check in ("copy", "empty", "mojibake", "language"))
    assert not any(text in json.dumps(found, ensure_ascii=False) for row in rows for text in row.values())


@pytest.mark.slow
def test_a_case_is_timed() -> None:
    found = measure_lint(20)
    assert (found["rows"], found["texts"]) == (20, 200)
    assert found["texts_per_second"] == 200 / found["cpu_seconds"]
