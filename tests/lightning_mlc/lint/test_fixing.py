"""Copies without the wrong translations."""

from __future__ import annotations

import csv
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lightning_mlc.cli import main
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Example

SOURCE = "How do I keep my bicycle from rusting in winter?"
RUSSIAN = "Как зимой уберечь велосипед от ржавчины?"
SWAHILI = "Ninawezaje kuzuia baiskeli yangu isipate kutu wakati wa baridi?"


def fixed(path: Path) -> list[Example]:
    out = path.with_name("fixed.jsonl")
    assert main(["lint", str(path), "--fix", "--out", str(out)]) == 1
    return list(parse_rows(read_rows(str(out), "data.train_path"), "en"))


def turns(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": {"en": SOURCE, "ru": SOURCE, "sw": SWAHILI}, "response": "r"},
        {"prompt_en": SOURCE, "prompt_RU": SOURCE, "prompt_sw": SWAHILI, "response": "r"},
        {"prompt": turns(SOURCE), "prompt_ru": turns(SOURCE), "prompt_sw": turns(SWAHILI), "output": "r"},
        {"prompt": SOURCE, "translations": {"RU": SOURCE, "sw": SWAHILI}, "response": "r"},
        {"instruction": SOURCE, "prompt_ru": "", "prompt_sw": SWAHILI, "output": "r"},
    ],
)
def test_a_wrong_translation_is_missing_in_every_layout(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": 7, **row}))
    (example,) = fixed(path)
    assert example.id == "7"
    assert {language: turn[0]["content"] for language, turn in example.prompts.items()} == {"en": SOURCE, "sw": SWAHILI}


def test_an_unpaired_surrogate_elsewhere_is_kept(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": {"en": SOURCE, "ru": RUSSIAN}, "response": "\ud83d"}
    path.write_text(json.dumps(row))
    assert main(["lint", str(path), "--fix", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == row


def test_multijail_keeps_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"id": 1, "source": "s", "tags": "t", "en": SOURCE, "ru": SOURCE, "sw": SWAHILI}
    path.write_text(json.dumps(row))
    assert main(["lint", str(path), "--fix", "--out", str(tmp_path / "out.jsonl")]) == 1
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {**row, "ru": None}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"prompt_en": SOURCE, "prompt_ru": SOURCE, "chosen": "a", "rejected": ""},
        {"prompt_en": SOURCE, "prompt_ru": RUSSIAN, "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = fixed(path)
    assert (set(first.prompts), first.rejected) == ({"en"}, "")
    assert (set(second.prompts), second.rejected) == ({"en", "ru"}, "b")


def test_responses_go_with_their_prompt_and_in_pairs(tmp_path: Path) -> None:
    answers = {
        "en": "Oil the chain.",
        "ru": "Смажьте цепь велосипеда маслом.",
        "sw": "Paka mafuta kwenye mnyororo wa baiskeli.",
    }
    others = {
        "en": "Do nothing at all.",
        "ru": "Ничего не делайте, пожалуйста.",
        "sw": "Do nothing at all, please, really.",
    }
    rows = [
        {"prompt": {"en": SOURCE, "ru": SOURCE, "sw": SWAHILI}, "chosen": answers, "rejected": others},
        {"prompt": {"en": SOURCE, "ru": RUSSIAN}, "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = fixed(path)
    assert set(first.prompts) == {"en", "sw"}  # the Russian prompt is a copy
    assert first.translated == {}  # and the rejected response in Swahili is English
    assert (first.chosen, second.chosen) == (answers["en"], "a")


def test_a_row_whose_source_is_wrong_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": {"en": " ", "ru": RUSSIAN}, "response": "r"},
        {"prompt": {"en": SOURCE, "ru": RUSSIAN, "sw": "\ud83d"}, "response": "r"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (example,) = fixed(path)
    assert set(example.prompts) == {"en", "ru"}
    assert "fixed.jsonl: 1 translations are null, 1 rows are left out" in capsys.readouterr().out


def test_nothing_is_written_where_a_row_cannot_be_read(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": {"en": SOURCE}}) + "\n{")
    assert main(["lint", str(path), "--skip", "mixed_scripts", "--fix", "--out", str(out)]) == 2
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_value_that_json_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "a.parquet", tmp_path / "out.jsonl"
    table = pyarrow.Table.from_pylist([{"prompt_en": SOURCE, "response": "r", "picture": b"\x00"}])
    pyarrow.parquet.write_table(table, path)
    assert main(["lint", str(path), "--fix", "--out", str(out)]) == 2
    assert "a.parquet row 1: the column 'picture' has a value of the type bytes" in capsys.readouterr().err
    assert not out.exists()


def test_dates_are_text(tmp_path: Path) -> None:
    path, out = tmp_path / "a.parquet", tmp_path / "out.jsonl"
    table = pyarrow.Table.from_pylist([{"prompt_en": SOURCE, "response": "r", "day": date(2026, 1, 2)}])
    pyarrow.parquet.write_table(table, path)
    assert main(["lint", str(path), "--fix", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["day"] == "2026-01-02"
