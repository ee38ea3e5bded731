"""Choosing checks, and running them over files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_mlc.errors import UserError
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.checks import all_checks
from lightning_mlc.lint.linting import choose_checks, lint

CHECKS = Path(__file__).parent / "checks"


def test_each_module_holds_one_check_of_its_name_with_a_test() -> None:
    modules = {path.stem for path in (Path(__file__).parents[3] / "lightning_mlc/lint/checks").glob("[a-z]*.py")}
    assert len(modules) > 20
    assert all_checks().keys() == modules
    assert {path.stem.removeprefix("test_") for path in CHECKS.glob("test_*.py")} == modules


def test_the_docs_have_each_check() -> None:
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    missing = [name for name, kind in all_checks().items() if f"| `{name}` | {kind.severity} |" not in text]
    assert missing == []


def names(**options: list[str]) -> list[str]:
    return [check.name for check in choose_checks(LintSettings(), **options)]


def test_checks_are_chosen_by_name() -> None:
    assert names(only=["copy", "digits"]) == ["copy", "digits"]
    assert "copy" not in names(skip=["copy"])
    assert len(names(skip=["copy"])) == len(names()) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["cpoy"]}, "--only: there is no check 'cpoy'; did you mean copy?"),
        ({"skip": ["zzz"]}, "--skip: there is no check 'zzz'; choose from answer, "),
        ({"only": ["copy"], "skip": ["copy"]}, "--skip: leaves no check"),
        ({"only": ["tokens"]}, "--only: the check 'tokens' needs --model"),
    ],
)
def test_wrong_names_get_one_line(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError) as error:
        choose_checks(LintSettings(), **options)
    assert message in str(error.value)


def test_a_report_counts_by_check_and_language(tmp_path: Path) -> None:
    source = "How do I keep my bicycle from rusting in winter?"
    rows = [
        {"id": "one", "prompt": {"en": source, "ru": source, "sw": "?"}},
        {"prompt": {"en": source, "ru": "Как зимой уберечь велосипед от ржавчины?"}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    seen = []
    checks = choose_checks(LintSettings("en", (str(path),)), only=["copy", "script", "empty", "few_rows"])
    report = lint([str(path)], "en", checks, lambda file, row, found: seen.append((file, row.id, len(found))))
    assert report.rows == 2
    assert report.texts == {"en": 2, "ru": 2, "sw": 1}
    assert report.counts() == {("copy", "ru"): 1, ("script", "ru"): 1, ("empty", "sw"): 1}
    assert (report.total("error"), report.total("warning")) == (3, 0)
    assert {(found.file, found.row, found.id) for found in report.of_rows} == {(str(path), 1, "one")}
    assert seen == [(0, "one", 3), (0, "a.jsonl row 2", 0)]


def test_statistics_are_of_all_rows_before_any_is_checked(tmp_path: Path) -> None:
    """The first row is the odd one."""
    rows = [
        {"prompt": {"en": f"Number {n}", "ku": "Ev çi ye gelo, heval?" if n == 0 else "ئەمە چییە هاوڕێ گیان؟"}}
        for n in range(4)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = lint([str(path)], "en", choose_checks(LintSettings(), only=["mixed_scripts"]))
    assert [found.row for found in report.of_rows] == [1]


def test_the_sample_has_no_errors_and_two_warnings() -> None:
    """Both are requests in Japanese for questions in English, see the data card."""
    report = lint(["sample"], "en", choose_checks(LintSettings("en", ("sample",))))
    assert report.counts() == {("question", "ja"): 2}
