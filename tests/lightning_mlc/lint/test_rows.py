"""Rows of all layouts, as checks see them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lightning_mlc.errors import UserError
from lightning_mlc.lint.rows import read


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def texts(path: str, source: str = "en") -> list[list[tuple[str, str, str]]]:
    return [[(pair.text.language, pair.part, pair.text.content) for pair in row.pairs] for row in read(path, source)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": {"en": "A?", "sw": "B?", "ur": None}, "response": "c"},
        {"prompt_en": "A?", "prompt_sw": "B?", "chosen": "c", "rejected": "d"},
        {"prompt": [{"from": "human", "value": "A?"}], "prompt_sw": [{"from": "human", "value": "B?"}], "response": ""},
        {"prompt": "A?", "translations": {"sw": "B?", "ur": None}, "response": "c"},
        {"instruction": "A?", "input": "", "output": "c", "prompt_SW": "B?"},
        {"id": 3, "source": "x", "tags": "y", "en": "A?", "sw": "B?"},
    ],
)
def test_layouts(tmp_path: Path, row: object) -> None:
    assert texts(write(tmp_path / "a.jsonl", row)) == [[("en", "prompt", "A?"), ("sw", "prompt", "B?")]]


def test_a_csv_file(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt_en", "prompt_sw", "response"], ["A?", "B?", "c"], ["A?", "", "c"]])
    assert texts(str(tmp_path / "a.csv")) == [
        [("en", "prompt", "A?"), ("sw", "prompt", "B?")],
        [("en", "prompt", "A?")],
    ]


def test_messages_of_a_conversation_are_one_text_without_the_system(tmp_path: Path) -> None:
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    assert texts(write(tmp_path / "a.jsonl", {"prompt": {"en": prompt}})) == [[("en", "prompt", "A\nB\nC")]]


def test_translated_responses(tmp_path: Path) -> None:
    row = {
        "prompt": {"en": "A", "sw": "B", "ur": "C"},
        "chosen": {"en": "D", "sw": "E"},
        "rejected": {"en": "F", "sw": ""},
    }
    path = write(tmp_path / "a.jsonl", row)
    assert texts(path)[0][3:] == [("sw", "chosen", "E"), ("sw", "rejected", "")]
    (found,) = read(path, "en")
    assert [pair.source.content for pair in found.pairs] == ["A", "A", "A", "D", "F"]


def test_texts_that_training_refuses_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": {"en": "A", "sw": "", "ur": "\ud83d"}}, {"prompt": {"en": " ", "sw": "B"}}]
    assert texts(write(tmp_path / "a.jsonl", *rows)) == [
        [("en", "prompt", "A"), ("sw", "prompt", ""), ("ur", "prompt", "\ud83d")],
        [("en", "prompt", " "), ("sw", "prompt", "B")],
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": {"sw": "B"}}],
            r"a.jsonl row 1: has no prompt in the source language 'en' \(it has sw\); add it or set --source_language",
        ),
        ([{"prompt": {"en": "A"}}, {"prompt": {"en": "A", "xx1": "B"}}], "a.jsonl row 2: 'xx1' is not a language code"),
        ([{"text": "A"}], "a.jsonl row 1: has no prompt"),
    ],
)
def test_what_cannot_be_read_gets_one_line(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        texts(write(tmp_path / "a.jsonl", *rows))
