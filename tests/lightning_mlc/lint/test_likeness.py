"""Scores of texts with their own source and with another one, and the limit between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import write_jsonl
from translations import row

from lightning_mlc.errors import UserError
from lightning_mlc.lint import likeness
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.likeness import LikenessCheck
from lightning_mlc.lint.linting import lint
from lightning_mlc.lint.rows import LintRow
from lightning_mlc.lint.texts import Text


class Numbers(LikenessCheck):
    """Texts are numbers: the nearer, the more alike. There is no score for a minus."""

    name = "numbers"
    severity = "warning"
    title = "another number"
    limit = 0.5
    unit = "nearness"

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[int] = []

    def scores(self, pairs: Sequence[tuple[Text, Text]]) -> list[float | None]:
        self.blocks.append(len(pairs))
        return [
            None if text.content == "-" else -abs(float(source.content) - float(text.content)) for source, text in pairs
        ]


def found(check: LikenessCheck, rows: Sequence[LintRow]) -> tuple[list[tuple[int, str]], list[Finding]]:
    for one in rows:
        check.learn(0, one)
    in_rows = [(one.where.number, finding.language) for one in rows for finding in check.check(0, one)]
    return in_rows, list(check.columns())


def counted(texts: dict[int, dict[str, str]], rows: int = 40) -> list[LintRow]:
    """Rows with 10, 20, 30, ..., translated as themselves but for ``texts``, by row."""
    usual = [{"en": f"{10 * n}", "sw": f"{10 * n}"} for n in range(1, rows + 1)]
    return [row(n, {**own, **texts.get(n, {})}) for n, own in enumerate(usual, start=1)]


def test_the_limit_is_half_way_to_another_source() -> None:
    """Own texts have 0, those of the row before -10, so -5 is the limit."""
    rows = counted({7: {"sw": "64"}, 8: {"sw": "74"}, 30: {"sw": "297"}})
    assert found(Numbers(), rows) == ([(7, "sw"), (8, "sw")], [])


def test_each_column_is_measured_by_itself() -> None:
    rows = [
        row(n, {"en": f"{10 * n}", "sw": f"{10 * n + (6 if n == 9 else 0)}", "ur": f"{10 * n + 4 * (-1) ** n}"})
        for n in range(1, 41)
    ]
    assert found(Numbers(), rows) == ([(9, "sw")], [])


def test_a_column_that_cannot_be_told_from_other_texts_is_named_as_a_whole() -> None:
    rows = [row(n, {"en": f"{10 * n}", "sw": f"{10 * (n % 7)}"}) for n in range(1, 41)]
    in_rows, (finding,) = found(Numbers(), rows)
    assert in_rows == []
    assert finding.language == "sw"
    assert finding.note.endswith("is the language known to the model?")


def test_few_texts_and_rows_of_one_source_say_nothing() -> None:
    assert found(Numbers(), counted({3: {"sw": "99"}}, rows=20)) == ([], [])
    same = [row(n, {"en": "10", "sw": "10" if n != 5 else "99"}) for n in range(1, 41)]
    assert found(Numbers(), same) == ([], [])


def test_texts_without_a_score_are_counted() -> None:
    few = {n: {"sw": "-"} for n in (4, 9)}
    assert found(Numbers(), counted({**few, 7: {"sw": "64"}})) == ([(7, "sw")], [])
    many = {n: {"sw": "-"} for n in range(1, 7)}
    in_rows, (finding,) = found(Numbers(), counted({**many, 12: {"sw": "114"}}))
    assert in_rows == [(12, "sw")]
    assert finding.note == "6 of 40 texts have no nearness"


def test_blocks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = counted({7: {"sw": "64"}, 40: {"sw": "0"}})
    whole, parts = Numbers(), Numbers()
    expected = found(whole, rows)
    monkeypatch.setattr(likeness, "BLOCK", 7)
    assert found(parts, rows) == expected
    assert (len(whole.blocks), len(parts.blocks)) == (1, 6)
    assert sum(whole.blocks) == sum(parts.blocks) == 40 + 39


def test_a_file_that_grows_is_one_line(tmp_path: Path) -> None:
    rows = [{"prompt": {"en": f"{10 * n}", "sw": f"{10 * n}"}} for n in range(1, 31)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    class Growing(Numbers):
        def scores(self, pairs: Sequence[tuple[Text, Text]]) -> list[float | None]:
            write_jsonl(path, [*rows, *rows[:1]])
            return super().scores(pairs)

    with pytest.raises(UserError, match=r"a.jsonl row 31: was not there a moment ago"):
        lint([str(path)], "en", [Growing()])


def test_no_score_at_all() -> None:
    in_rows, (finding,) = found(Numbers(), counted({n: {"sw": "-"} for n in range(1, 41)}))
    assert (in_rows, finding.note) == ([], "40 of 40 texts have no nearness")
