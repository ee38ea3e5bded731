"""Any layout in, ours out, and every other column as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.errors import UserError
from lightning_mlc.translation.rows import PROVENANCE, read_source

PAIR = {"chosen": "No.", "rejected": "Yes."}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And now?"},
]
SHAREGPT = [{"from": "human", "value": "Hello"}]


@pytest.mark.parametrize(
    ("row", "prompt", "others"),
    [
        ({"prompt": {"en": "Hello", "sw": None}, "topic": 3, **PAIR}, {"en": "Hello"}, {"topic": 3, **PAIR}),
        (
            {"prompt_en": "Hello", "prompt_fr": "Salut", "id": 7, **PAIR},
            {"en": "Hello", "fr": "Salut"},
            {"id": 7, **PAIR},
        ),
        ({"prompt": "Hello", "prompt_zh": SHAREGPT, **PAIR}, {"en": "Hello", "zh": "Hello"}, PAIR),
        (
            {"instruction": "Add", "input": "1 and 2", "output": "3"},
            {"en": "Add\n1 and 2"},
            {"output": "3"},
        ),
        ({"prompt": "Hello", "input": "kept", "response": "Hi"}, {"en": "Hello"}, {"input": "kept", "response": "Hi"}),
        (
            {"id": "a", "source": "s", "tags": ["t"], "en": "Hello"},
            {"en": "Hello"},
            {"id": "a", "source": "s", "tags": ["t"]},
        ),
        ({"prompt": {"en": TURNS}, **PAIR}, {"en": TURNS}, PAIR),
    ],
)
def test_layouts_become_ours(tmp_path: Path, row: dict[str, Any], prompt: Any, others: dict[str, Any]) -> None:
    (found,) = read_source(str(write_jsonl(tmp_path / "data.jsonl", [row])), "en")
    assert json.loads(found.as_line(found.prompts, {})) == {"prompt": prompt, **others, PROVENANCE: {}}


def test_a_translated_csv_file_means_the_same_to_training(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('id,prompt_en,response,label\na,"Hello, you",Hi,TRUE\nb,Bye,,false\n', encoding="utf-8")
    written = write_jsonl(
        tmp_path / "out.jsonl", [json.loads(row.as_line(row.prompts, {})) for row in read_source(str(path), "en")]
    )
    before, after = (
        [(one.id, one.prompts, one.chosen, one.rejected, one.labelled) for one in parse_rows(rows, "en")]
        for rows in (read_rows(str(path), "file"), read_rows(str(written), "file"))
    )
    assert before == after


def test_parquet_rows_with_dates_are_written_as_text(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"prompt_en": ["Hello"], "day": [datetime.date(2026, 1, 2)], "raw": [b"x"]})
    parquet.write_table(table.drop_columns("raw"), tmp_path / "a.parquet")
    parquet.write_table(table, tmp_path / "b.parquet")
    (row,) = read_source(str(tmp_path / "a.parquet"), "en")
    assert json.loads(row.as_line(row.prompts, {}))["day"] == "2026-01-02"
    (row,) = read_source(str(tmp_path / "b.parquet"), "en")
    with pytest.raises(UserError, match=r"b.parquet row 1: the column 'raw' has a value of the type bytes, which JSON"):
        row.as_line(row.prompts, {})


@pytest.mark.parametrize(
    ("system", "turns"), [(False, ["Hello", "And now?"]), (True, ["Be kind.", "Hello", "And now?"])]
)
def test_the_users_turns_are_translated_and_never_the_answers(tmp_path: Path, system: bool, turns: list[str]) -> None:
    (row,) = read_source(str(write_jsonl(tmp_path / "data.jsonl", [{"prompt": {"en": TURNS}, **PAIR}])), "en")
    assert row.turns("en", system) == turns
    translated = row.translated("en", system, [turn.upper() for turn in turns])
    expected = [{**turn, "content": turn["content"].upper()} for turn in TURNS]
    expected[2]["content"] = "Hi"
    if not system:
        expected[0]["content"] = "Be kind."
    assert translated == expected


def test_kinds_and_earlier_provenance_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": {"en": "a"}, "kind": "harmful", PROVENANCE: {"sw": {"model": "m"}, "ur": None}},
        {"prompt": {"en": "b"}, "kind": "poem"},
        {"prompt": {"en": "c"}},
    ]
    found = list(read_source(str(write_jsonl(tmp_path / "data.jsonl", rows)), "en"))
    assert [row.kind for row in found] == ["harmful", "", ""]
    new = json.loads(found[0].as_line(found[0].prompts, {"zh-Hans": {"model": "n"}}))
    assert new[PROVENANCE] == {"sw": {"model": "m"}, "zh-Hans": {"model": "n"}}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": {"sw": "Habari"}}], "data.jsonl row 1: has no prompt in the source language 'en' (it has sw)"),
        (
            [{"prompt": {"en": "a"}, "id": 1}, {"prompt": {"en": "b"}, "id": "1"}],
            "data.jsonl row 2: the id '1' is taken",
        ),
        ([{"prompt": {"en": "a"}, PROVENANCE: "GPT"}], f"data.jsonl row 1: has a column '{PROVENANCE}'"),
        ([{"text": "a"}], "data.jsonl row 1: has no prompt"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, rows: list[Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        list(read_source(str(write_jsonl(tmp_path / "data.jsonl", rows)), "en"))
    assert told in str(refused.value)


def test_half_a_character_in_a_response_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": {"en": "Hello"}, "response": "half \ud83d"}))
    (row,) = read_source(str(path), "en")
    assert json.loads(row.as_line(row.prompts, {}))["response"] == "half \ud83d"
