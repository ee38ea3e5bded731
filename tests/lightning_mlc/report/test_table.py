"""The text of tables: cells, width, output without colour or Unicode, and names that look like markup."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from lightning_mlc.report import before_after_tables, write_table_csv

TEN = ("en", "zh-Hant", "ru", "ja", "ar", "bn", "sw", "ur", "ps", "ku")


def results(languages: Sequence[str], metrics: Sequence[str], shift: float = 0.0) -> dict[str, float]:
    rows = (*languages, "mean", "worst", "spread")
    return {f"val/{metric}/{row}": 0.125 * i - 0.5 + shift for metric in metrics for i, row in enumerate(rows)}


def printed(
    before: dict[str, float] | None, after: dict[str, float], languages: Sequence[str], encoding: str = "utf-8"
) -> list[str]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")  # strict: raises if a character cannot be written
    console = Console(file=stream, width=80)
    for table in before_after_tables(before, after, languages, languages[0]):
        console.print(table)
    stream.flush()
    return raw.getvalue().decode(encoding).splitlines()


def cells(lines: list[str], row: str) -> list[str]:
    return next(line for line in lines if line.split()[:1] == [row]).split("  ")


def test_ten_languages_and_three_metrics_fit_without_folding() -> None:
    metrics = ("rewards/accuracies", "rewards/margins", "nll")
    lines = printed(results(TEN, metrics), results(TEN, metrics, 10.0), TEN)
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    starts = [line.split()[0] for line in lines if "→" in line]
    assert starts == [*TEN, "mean", "worst", "spread"]
    assert [cell.strip() for cell in cells(lines, "ku") if cell.strip()] == [
        "ku",
        "62% → 1062%",
        "0.625 → 10.625",
        "0.625 → 10.625",
    ]


def test_only_the_source_is_marked() -> None:
    lines = printed(None, results(TEN, ["nll"]), TEN)
    assert [line.split()[0] for line in lines if "(source)" in line] == ["en"]


def test_metrics_that_were_not_measured_have_no_column() -> None:
    text = "\n".join(printed(None, results(TEN, ["nll"]), TEN))
    assert "NLL per token" in text
    assert "reward" not in text


def test_latin_output_gets_an_arrow_of_its_own() -> None:
    after = results(TEN, ["nll"])
    lines = printed(after, after, TEN, encoding="latin-1")
    assert any("-0.500 -> -0.500" in line for line in lines)


def test_names_are_no_markup() -> None:
    languages = ("[bold]x", "[/]")
    text = "\n".join(printed(None, {f"[red]/nll/{name}": 1.0 for name in languages}, languages))
    assert all(name in text for name in ("[bold]x (source)", "[/]", "[red]"))


def test_missing_and_not_finite_values_are_told_apart() -> None:
    before = {"val/nll/en": 1.0, "val/nll/mean": 1.0, "val/rewards/accuracies/en": math.nan}
    after = {"val/nll/en": math.nan, "val/nll/mean": math.inf, "val/nll/ja": 2.0, "val/rewards/accuracies/en": math.nan}
    lines = printed(before, after, ("en", "sw", "ja"))
    assert any("nan → nan" in line and "1.000 → nan" in line for line in lines)
    assert [cell.strip() for cell in cells(lines, "sw") if cell.strip()] == ["sw", "-", "-"]
    assert any("ja" in line and "- → 2.000" in line for line in lines)
    assert any("mean" in line and "1.000 → inf" in line for line in lines)


def test_the_second_table_has_what_was_measured_in_its_order() -> None:
    after = {"val/mlc/extracted/min_cosine": 0.25, "val/loss": 0.5, "val/mlc/raw/explained_variance": 0.75}
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(before_after_tables({"val/loss": 1.0}, after, ("en",), "en")[1])
    lines = [" ".join(line.split()) for line in console.export_text().splitlines() if line.strip()]
    assert lines == [
        "loss 1.0000 → 0.5000",
        "explained variance, hidden states - → 0.7500",
        "smallest cosine, extracted - → 0.2500",
    ]


def test_nothing_measured_is_an_empty_table() -> None:
    assert any("language" in line for line in printed(None, {}, ("en",)))


def test_csv_keeps_every_metric_in_full(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_table_csv(path, {"val/old": 0.1 + 0.2, "val/loss": 2.0}, {"val/loss": math.nan, "val/new, odd": 1.0})
    assert path.read_bytes().count(b"\r") == 0
    rows = list(csv.reader(path.open()))
    assert rows == [
        ["metric", "before", "after"],
        ["val/loss", "2.0", "nan"],
        ["val/new, odd", "", "1.0"],
        ["val/old", repr(0.1 + 0.2), ""],
    ]
    assert float(rows[3][1]) == 0.1 + 0.2


def test_csv_without_before(tmp_path: Path) -> None:
    write_table_csv(tmp_path / "t.csv", None, {"val/loss": 0.5})
    assert (tmp_path / "t.csv").read_text() == "metric,before,after\nval/loss,,0.5\n"


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_split_is_that_of_the_results(split: str) -> None:
    text = "\n".join(printed(None, {f"{split}/nll/en": 1.5}, ("en",)))
    assert "1.500" in text
    assert {"test": "test", "val": "validation"}[split] in text
