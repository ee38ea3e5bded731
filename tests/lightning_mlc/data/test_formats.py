"""A table gives the same examples in every format. If a format cannot hold a value, the message names the row."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import example_rows, write_jsonl
from datasets import Dataset

from lightning_mlc.data import json_rows, reading, uniqueness
from lightning_mlc.data.file_layouts import parse_rows, prompts_of_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Example
from lightning_mlc.errors import UserError

COLUMNS = ("id", "prompt_en", "prompt_sw", "prompt_no", "chosen", "rejected", "note")
CELLS: list[tuple[str | None, ...]] = [
    ("007", "NA", "null", "None", "True", "1.50", "nan"),
    ("1e3", "a, b", 'say "yes"', None, "line\nbreak", "carriage\r\nreturn", None),
    ("-0", " spaced ", None, "ærlig \u2028 og\u0085", "水\U0001f4a7", "", ""),
    ("Infinity", "false", "#N/A", "7", "", "NaN", "x"),
]
"""Texts that readers mistake for something else. None is a missing value; an empty text is an empty response."""
PAIRS = [dict(zip(COLUMNS, cells, strict=True)) for cells in CELLS]
LABELLED = [
    {"id": None, "prompt_en": "NA", "prompt_sw": None, "response": "NULL", "label": True},
    {"id": "a", "prompt_en": "b", "prompt_sw": "c\n\nd", "response": "", "label": False},
]


def as_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path.with_suffix(".csv"))


def as_json(path: Path, rows: list[dict[str, Any]]) -> str:
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return str(path.with_suffix(".json"))


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    return str(write_jsonl(path.with_suffix(".jsonl"), rows))


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    Dataset.from_list(rows).to_parquet(path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


def as_saved(path: Path, rows: list[dict[str, Any]]) -> str:
    Dataset.from_list(rows).save_to_disk(path)
    return str(path)


WRITERS = [as_csv, as_json, as_jsonl, as_parquet, as_saved]
Writer = Callable[[Path, list[dict[str, Any]]], str]


def load(path: str) -> list[Example]:
    return list(parse_rows(read_rows(path, "data.train_path"), "en"))


def without_place(example: Example) -> Example:
    own_id = "" if example.id == example.where else example.id
    return replace(example, id=own_id, where="row " + example.where.rpartition(" row ")[2])


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labelled"])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["rows", "br[1]", "a*?{b}", "two words ñ水"])
def test_every_format_gives_the_same_examples(
    tmp_path: Path, write: Writer, rows: list[dict[str, Any]], name: str
) -> None:
    for decoy in ("br1", "a12b"):  # these would match if the names were patterns
        write(tmp_path / decoy, [row | {"prompt_en": "another"} for row in rows])
    found = [without_place(example) for example in load(write(tmp_path / name, rows))]
    for number, (example, row) in enumerate(zip(found, rows, strict=True), start=1):
        prompts = {key[7:]: text for key, text in row.items() if key.startswith("prompt_") and text is not None}
        assert {language: turns[0]["content"] for language, turns in example.prompts.items()} == prompts
        assert (example.id, example.where) == (row["id"] or "", f"row {number}")
        if rows is PAIRS:
            assert (example.chosen, example.rejected, example.kind) == (row["chosen"], row["rejected"], "pairs")
        else:
            response = (row["response"], None) if row["label"] else (None, row["response"])
            assert (example.chosen, example.rejected, example.kind) == (*response, "unpaired")


def written(folder: Path, text: str | bytes, name: str = "a.csv") -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


@pytest.mark.parametrize(
    "text",
    [
        "prompt_en, prompt_sw ,chosen,rejected\na,b,c,d\n",
        "\ufeffprompt_en,prompt_sw,chosen,rejected\r\na,b,c,d\r\n\r\n",
        '\ufeff"prompt_en","prompt_sw","chosen","rejected"\r"a","b","c","d"\r',
        ",prompt_en,prompt_sw,chosen,rejected\n0,a,b,c,d\n",  # the index of pandas
        "prompt_en,prompt_sw,chosen,rejected,,\na,b,c,d,,",
    ],
)
def test_headers_and_line_ends(tmp_path: Path, text: str) -> None:
    (example,) = load(written(tmp_path, text))
    assert {language: turns[0]["content"] for language, turns in example.prompts.items()} == {"en": "a", "sw": "b"}
    assert (example.chosen, example.rejected) == ("c", "d")


HEADER = "prompt_en,response\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "a,b\n\nc,d,e\n", r"^a\.csv row 2: has 3 cells \(line 4\), but the header has 2; quote"),
        (HEADER + '"a\nb",c\nd\n', r"^a\.csv row 2: has 1 cells \(line 4\), but the header has 2"),
        (HEADER + 'a,"b\n', r"^a\.csv row 1: is not CSV \(unexpected end of data, line 2\)"),
        (HEADER + 'a,"b"c\n', r"^a\.csv row 1: is not CSV"),
        ("prompt_en,response, prompt_en\na,b,c\n", r"^data\.train_path: .*a\.csv has the column 'prompt_en' twice"),
        ("prompt_en,,response,\na,,b,c\n", r"^a\.csv row 1: has text in column 4, which has no name"),
        ("prompt_en;response\na;b\n", "a.csv has semicolons between its cells; write it with commas"),
        (HEADER, "a.csv has no rows"),
        (HEADER.encode() + b"a,b\xff\n", r"a\.csv is not UTF-8 \(byte 22\)"),
        ("prompt_en,response,label\na,b,1\n", r"^a\.csv row 1: 'label' must be true .* or false, got str"),
        ("prompt_en,response,label\na,b,true\nc,d,\n", r"^a\.csv row 2: has a response without a label"),
        ("prompt_en,chosen,rejected\na,,\n", r"^a\.csv row 1: has no response"),
    ],
)
def test_what_is_wrong_with_a_csv_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(written(tmp_path, text))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    text = "long " * 100_000
    (example,) = load(written(tmp_path, f"{HEADER}{text},b\n"))
    assert example.prompts["en"][0]["content"] == text


ROW = '{"prompt": {"en": "a"}, "response": "b"'


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (', "id": ' + "1" * 5000 + "}", "has a number of 5000 digits; write it as a string"),
        (', "score": NaN}', "has NaN, which is not JSON; write null"),
        (', "score": -Infinity}', "has -Infinity, which is not JSON"),
        (', "more": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
        (', "more": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}", "is nested too deeply"),
        (', "a": 1, "a": 2}', "has the key 'a' twice"),
        (', "a": 1 "b": 2}', "is not JSON (Expecting ',' delimiter at"),
        (', "a": "\\x"}', "is not JSON (Invalid \\escape"),
        (', "id": true}', "'id' must be a string or a whole number, got bool"),
        (', "id": 1.5}', "'id' must be a string or a whole number, got float"),
    ],
)
@pytest.mark.parametrize("form", ["a.jsonl", "a.json"])
def test_a_wrong_json_row_is_named_in_one_line(tmp_path: Path, form: str, more: str, told: str) -> None:
    good = [f'{ROW}, "id": {number}}}' for number in range(2)]
    text = "\n".join([*good, ROW + more, *good]) if form == "a.jsonl" else ",\n".join(["[" + good[0], ROW + more, "]"])
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, text, form))
    assert str(caught.value).startswith(f"{form} row {3 if form == 'a.jsonl' else 2}: {told}")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_a_long_id_is_an_id_and_is_shortened_in_messages(tmp_path: Path) -> None:
    row = {"prompt": {"en": "a"}, "response": "b", "id": "9" * 5000}
    (example,) = load(as_jsonl(tmp_path / "a", [row]))
    assert example.id == "9" * 5000
    with pytest.raises(UserError, match=r"^b\.jsonl row 2: the id '9{56} \.\.\.' is taken by b\.jsonl row 1; ids"):
        load(as_jsonl(tmp_path / "b", [row, row]))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_an_array_is_read_in_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    rows = [
        *PAIRS,
        {"prompt_en": '"}],[{\\', "chosen": "\U0001f600\ud83d"[0], "rejected": "\\u0041", "n": [-1.5e3, True]},
    ]
    text = "\ufeff \n" + json.dumps(rows, ensure_ascii=False, indent=2)
    assert [row for _, row in read_rows(written(tmp_path, text, "a.json"), "--data")] == rows
    assert [row for _, row in read_rows(written(tmp_path, json.dumps(rows), "a.json"), "--data")] == rows
    for wrong, message in [
        ('[{"a": "b",\n"c": 1 "d": 2}]', r"^a\.json row 1: is not JSON \(Expecting ',' delimiter at line 2\)"),
        ('[{"a": 1},\n\n{"b": 2}\n{"c": 3}]', r"^a\.json row 2: is not followed by a comma or \] \(line 4\)"),
        ('[{"a": 1},\n]', r"^a\.json row 2: is not JSON \(Expecting value, line 2\)"),
        ('[{"a": 1}, "b"]', r"^a\.json row 2: is not a JSON object"),
        ('[{"a": 1}, {"b": "c', r"^a\.json row 2: is not JSON \(Unterminated string"),
        ('[{"a": 1}', r"^a\.json row 1: is not followed by a comma or \] \(line 1\)"),
        ('[{"a": 1}]\n[]', r"^--data: .*a\.json has text after its array \(line 2\)"),
        (b'[{"a": "\xc3\xa9\xff"}]', r"^--data: .*a\.json is not UTF-8 \(byte 10\)"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_rows(written(tmp_path, wrong, "a.json"), "--data"))


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_not_held(tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with 8 MB of text, read with an eighth of that memory."""
    monkeypatch.setattr(json_rows, "CHUNK", 1 << 15)
    monkeypatch.setattr(reading, "BATCH", 4)
    path = write(tmp_path / "a", [{"id": str(n), "prompt_en": f"{n:07} " * 5000, "response": "b"} for n in range(200)])
    rows = parse_rows(read_rows(path, "--data"), "en")
    next(rows)  # imports
    tracemalloc.start()
    assert sum(1 for _ in rows) == 199
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_ids_are_compared_with_all_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniqueness, "_FEWEST", 4)
    for first in range(40):
        rows = [{"id": str(number), "prompt_en": "a", "response": "b"} for number in range(40)]
        with pytest.raises(
            UserError, match=rf"^a\.jsonl row 41: the id '{first}' is taken by a\.jsonl row {first + 1};"
        ):
            load(as_jsonl(tmp_path / "a", [*rows, rows[first]]))
    assert len(load(as_jsonl(tmp_path / "a", rows))) == 40


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_null_is_as_good_as_absent(tmp_path: Path, write: Writer) -> None:
    """Tables cannot leave a key out of a single row."""
    messages = [
        {"role": None, "content": None, "from": "human", "value": "a"},
        {"role": "assistant", "content": "b", "from": None, "value": None},
        {"role": "user", "content": "c", "from": None, "value": None},
    ]
    common = {"prompt": messages, "prompt_en": None, "instruction": None, "prompt_sw": [messages[0]]}
    single = {
        "chosen": {"en": None, "sw": None},
        "rejected": None,
        "response": None,
        "completion": "r",
        "label": None,
        "id": None,
    }
    pair = {"chosen": {"en": "x", "sw": None}, "rejected": {"en": "y", "sw": None}, "response": None, "label": None}
    (example,) = load(write(tmp_path / "single", [common | single]))
    assert [turn["content"] for turn in example.prompts["en"]] == ["a", "b", "c"]
    assert [turn["role"] for turn in example.prompts["en"]] == ["user", "assistant", "user"]
    assert (example.chosen, example.kind, example.id) == ("r", "single", example.where)
    (example,) = load(write(tmp_path / "pair", [common | pair]))
    assert (example.chosen, example.rejected, example.translated) == ("x", "y", {})


def test_a_first_row_without_source_prompt_does_not_lose_the_others(tmp_path: Path) -> None:
    """An empty cell in the first row does not determine the type of its column."""
    path = written(tmp_path, "id,prompt,prompt_sw\n1,,a\n2,b,c\n")
    found = [sorted(prompts) for _, _, prompts in prompts_of_rows(read_rows(path, "--data"), "en")]
    assert found == [["sw"], ["en", "sw"]]


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_what_a_message_has_beside_its_text_is_not_dropped(tmp_path: Path, key: str) -> None:
    turn = {"role": "assistant", "content": "b", key: "x"}
    row = {"prompt_en": "a", "response": [turn]}
    with pytest.raises(UserError, match=rf"^a\.jsonl row 1: 'response' has a message with '{key}', which is not"):
        load(as_jsonl(tmp_path / "a", [row]))
    assert load(as_jsonl(tmp_path / "a", [row | {"response": [turn | {key: None}]}]))[0].chosen == "b"


def test_splits_may_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, **options: Any) -> Dataset:
        asked.append({"path": path, **options})
        return Dataset.from_list(example_rows(1))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for query in ("?split=train+test", "?split=train%2Btest[:10%]&name=c&revision=r", ""):
        assert len(load(f"hf://a/b{query}")) == 1
    assert [options["split"] for options in asked] == ["train+test", "train+test[:10%]", "train"]
    assert asked[1] == {"path": "a/b", "split": "train+test[:10%]", "name": "c", "revision": "r"}
    for query in ("?split=a&split=b", "?split=", "#x"):
        with pytest.raises(UserError, match=r"^data\.train_path: write hf://owner/name"):
            load(f"hf://a/b{query}")
