"""Every format and layout, and one clear line for each kind of fault in a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import example_rows, write_jsonl
from datasets import Dataset, DatasetDict

from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Example
from lightning_mlc.errors import UserError


def load(path: Path | str, source: str = "en") -> list[Example]:
    return list(parse_rows(read_rows(str(path), "data.train_path"), source))


def content(example: Example) -> tuple[Any, ...]:
    return {k: v[-1]["content"] for k, v in example.prompts.items()}, example.chosen, example.rejected


ROWS = example_rows(3)
EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


def save_json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def save_csv(folder: Path) -> Path:
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt_en", "prompt_sw", "prompt_zh", "chosen", "rejected"])
        for row in ROWS:
            writer.writerow([*row["prompt"].values(), row["chosen"], row["rejected"]])
    return path


def save_parquet(folder: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def save_dataset(folder: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def save_dataset_dict(folder: Path) -> Path:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(folder / "saved")
    return folder / "saved"


def save_with_bom(folder: Path) -> Path:
    path = write_jsonl(folder / "rows.jsonl", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: write_jsonl(folder / "rows.jsonl", ROWS),
        save_with_bom,
        save_json,
        save_csv,
        save_parquet,
        save_dataset,
        save_dataset_dict,
    ],
)
def test_formats(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    assert [content(example) for example in load(save(tmp_path))] == EXPECTED


def test_missing_translations_in_every_format(tmp_path: Path) -> None:
    rows = example_rows(2)
    rows[0]["prompt"]["sw"] = None
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.csv").write_text("prompt_en,prompt_sw,chosen,rejected\na,,b,c\nd,e,f,g\n", encoding="utf-8")
    for name in ("rows.parquet", "rows.jsonl", "rows.csv"):
        first, second = load(tmp_path / name)
        assert "sw" not in first.prompts
        assert "sw" in second.prompts


def test_messages_and_instruction_data(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How are you?"},
    ]
    row = {"prompt": {"en": turns, "EN-gb": "Hi"}, "response": [{"role": "assistant", "content": "Fine."}], "x": 1}
    (example,) = load(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert example.prompts == {"en": turns, "en-GB": [{"role": "user", "content": "Hi"}]}
    assert (example.chosen, example.rejected) == ("Fine.", None)
    assert example.where == "a.jsonl row 1"


def test_the_authors_preference_layout(tmp_path: Path) -> None:
    row = {
        "prompt": [{"from": "human", "value": "What is tea?"}],
        "prompt_zh": [{"from": "human", "value": "茶是什么?"}],
        "chosen": {"from": "gpt", "value": "A drink."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    (example,) = load(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert content(example) == ({"en": "What is tea?", "zh": "茶是什么?"}, "A drink.", "No.")


def test_the_authors_alpaca_layout_in_another_source_language(tmp_path: Path) -> None:
    row = {"instruction": "Was ist Tee?", "input": "Kurz.", "output": "Ein Getränk.", "prompt_en": "What is tea?"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    (example,) = load(path, source="de")
    assert content(example) == ({"de": "Was ist Tee?\nKurz.", "en": "What is tea?"}, "Ein Getränk.", None)


def test_responses_by_language(tmp_path: Path) -> None:
    """In any layout, a language without its own response is left out, and a message is not taken for a language."""
    ours = GOOD | {
        "chosen": {"en": "No.", "SW": [{"role": "assistant", "content": "Hapana."}], "zh": None},
        "rejected": {"zh": None, "en": {"role": "assistant", "content": "Yes."}, "sw": "Ndiyo."},
    }
    authors = {
        "prompt": [{"from": "human", "value": "Tea?"}],
        "prompt_sw": [{"from": "human", "value": "Chai?"}],
        "chosen": {"en": {"from": "gpt", "value": "No."}, "sw": "Hapana."},
        "rejected": {"en": "Yes.", "sw": "Ndiyo."},
    }
    for number, row in enumerate((ours, authors)):
        (example,) = load(write_jsonl(tmp_path / f"{number}.jsonl", [row]))
        assert (example.chosen, example.rejected) == ("No.", "Yes.")
        assert example.translated == {"sw": ("Hapana.", "Ndiyo.")}
    assert load(write_jsonl(tmp_path / "plain.jsonl", [GOOD]))[0].translated == {}


def test_responses_by_language_in_a_format_that_fills_gaps(tmp_path: Path) -> None:
    rows = [row | {"chosen": {"en": row["chosen"]}, "rejected": {"en": row["rejected"]}} for row in example_rows(2)]
    rows[1]["chosen"]["sw"], rows[1]["rejected"]["sw"] = "Hapana.", "Ndiyo."
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    first, second = load(tmp_path / "rows.parquet")
    assert first.translated == {}
    assert second.translated == {"sw": ("Hapana.", "Ndiyo.")}


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ({"prompt": {"en": "a", "sw": "b"}}, {"response": "yes"}),
        ({"prompt_en": "a", "prompt_sw": "b"}, {"response": "yes"}),
        ({"prompt": "a", "prompt_sw": "b"}, {"completion": "yes"}),  # TRL's layout, plus translations
        (
            {"prompt": [{"role": "user", "content": "a"}], "prompt_sw": "b"},
            {"completion": [{"role": "assistant", "content": "yes"}]},
        ),
        ({"instruction": "a", "prompt_sw": "b"}, {"output": "yes"}),
    ],
)
def test_a_label_in_every_layout(tmp_path: Path, prompt: dict[str, Any], response: dict[str, Any]) -> None:
    rows = [prompt | response | {"label": label} for label in (True, False)]
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        desirable, undesirable = load(path)
        assert content(desirable) == ({"en": "a", "sw": "b"}, "yes", None)
        assert content(undesirable) == ({"en": "a", "sw": "b"}, None, "yes")
        assert desirable.kind == undesirable.kind == "unpaired"
    (without,) = load(write_jsonl(tmp_path / "a.jsonl", [prompt | response]))
    assert without.kind == "single"


@pytest.mark.parametrize(("true", "false"), [("True", "False"), ("true", "false")])
def test_labels_in_csv(tmp_path: Path, true: str, false: str) -> None:
    (tmp_path / "a.csv").write_text(f"prompt_en,response,label\na,b,{true}\nc,d,{false}\n", encoding="utf-8")
    assert [(example.chosen, example.rejected) for example in load(tmp_path / "a.csv")] == [("b", None), (None, "d")]


@pytest.mark.parametrize(("label", "kind"), [(1, "int"), ("good", "str"), (0.0, "float")])
def test_a_label_that_is_none(tmp_path: Path, label: Any, kind: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": {"en": "a"}, "response": "b", "label": label}])
    with pytest.raises(UserError, match=rf"^a\.jsonl row 1: 'label' must be true .* or false, got {kind}; leave"):
        load(path)


def test_an_empty_response_is_an_answer(tmp_path: Path) -> None:
    row = example_rows(1)[0] | {"chosen": ""}
    assert load(write_jsonl(tmp_path / "a.jsonl", [row]))[0].chosen == ""


GOOD = example_rows(1)[0]


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (GOOD | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"a\.jsonl row 2: is not JSON"),
        ("[1, 2]", r"a\.jsonl row 2: is not a JSON object"),
        (changed(prompt=...), "row 2: 'prompt' must hold one text per language"),
        (changed(prompt={"sw": "Habari"}), r"row 2: has no prompt in the source language 'en' \(it has sw\)"),
        (changed(prompt={"en": "a", "klingon": "b"}), "row 2: 'klingon' is not a language code"),
        (changed(prompt={"en": "a", "xx": "b"}), "row 2: 'xx' is not a language code"),
        (changed(prompt={"en": "a", "zh": "b", "ZH": "c"}), "row 2: has the language 'zh' twice"),
        (changed(prompt={"en": "a", "iw": "b", "he": "c"}), "row 2: has the language 'he' twice"),
        ('{"prompt": {"en": "a", "en": "b"}, "chosen": "c", "rejected": "d"}', "row 2: has the key 'en' twice"),
        (changed(prompt={"en": "a", "sw": "  "}), "row 2: the prompt in 'sw' is empty"),
        (changed(prompt={"en": 3}), "row 2: the prompt in 'en' must be a string or a list"),
        (changed(prompt={"en": [{"role": "assistant", "content": "x"}]}), "row 2: the prompt in 'en' must end with"),
        (changed(chosen="same", rejected="same"), "row 2: chosen and rejected are the same"),
        (changed(chosen={"sw": "a"}), "row 2: has no 'chosen' in the source language 'en'"),
        (changed(chosen={"en": "a", "sw": "b"}), "row 2: only one of chosen and rejected is translated into 'sw'"),
        (changed(chosen={"en": "a", "xx": "b"}), "row 2: 'chosen': 'xx' is not a language code"),
        (changed(chosen={"en": "a", "zh": "b", "ZH": "c"}), "row 2: 'chosen': language 'zh' is given twice"),
        (changed(chosen={"en": "a", "sw": 3}), "row 2: 'chosen' in 'sw' must be a string or a list"),
        (
            changed(chosen={"en": "a", "fr": "b"}, rejected={"en": "c", "fr": "d"}),
            "row 2: has responses in 'fr' but no prompt",
        ),
        (
            changed(chosen={"en": "a", "sw": "b"}, rejected={"en": "c", "sw": "b"}),
            "row 2: chosen and rejected are the same in 'sw'; set both to null",
        ),
        (changed(chosen=..., rejected=..., response={"en": "a"}), "row 2: 'response' has a message without"),
        (changed(chosen=...), "row 2: has no 'chosen'"),
        (changed(chosen=..., rejected=...), "row 2: has no response"),
        (
            changed(chosen=..., rejected=..., response="x"),
            "row 2: has a response without a label, the rows before it have a ch",
        ),
        (
            changed(chosen=..., rejected=..., response="x", label=True),
            "row 2: has a response with a label, the rows before it have a chosen and a rejected response; train",
        ),
        (changed(id="r0"), r"row 2: the id 'r0' is taken by a\.jsonl row 1"),
        (changed(id=[1]), "row 2: 'id' must be a string"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    if isinstance(row, dict):
        repeats_id = row["id"] == GOOD["id"] and "is taken" in message
        row = json.dumps(row if repeats_id or row["id"] != GOOD["id"] else row | {"id": "second"})
    path.write_text(path.read_text(encoding="utf-8") + row + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(path)


def test_messages_show_no_text(tmp_path: Path) -> None:
    """Prompts are harmful by design, so an error names the row and never quotes it."""
    row = {"prompt": {"en": "SECRET", "sw": " "}, "chosen": "SECRET", "rejected": "SECRET"}
    with pytest.raises(UserError) as caught:
        load(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert "SECRET" not in str(caught.value)


def test_first_row_without_any_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 1: has no prompt.*keys found: question"):
        load(write_jsonl(tmp_path / "a.jsonl", [{"question": "x"}]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b"", "data.train_path: .*a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.json", b'{"prompt": 1}', "must be a JSON array"),
        (
            "a.json",
            b'[{"prompt": {"en": "a"}, "response": "b"},\n{]',
            r"a.json row 2: is not JSON \(Expecting property .* at line 2\)",
        ),
        ("a.txt", b"x", "cannot read .*a.txt; supported are"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("a.parquet", b"not parquet", "cannot read .*a.parquet"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "data.train_path: there is no file missing.jsonl"),
        ("hf://only-a-name", "data.train_path: write hf://owner/name"),
        ("hf://owner/name?spilt=train", "data.train_path: write hf://owner/name"),
        ("hf://owner/name", "data.train_path: cannot load hf://owner/name"),
    ],
)
def test_a_missing_source_is_named(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a folder that datasets\.save_to_disk wrote"):
        load(tmp_path)


def test_the_sample_that_ships() -> None:
    examples = load("sample")
    assert len(examples) >= 64
    for example in examples:
        assert set(example.prompts) == {"en", "zh", "ru", "ja", "ar", "bn", "sw", "ur", "ps", "ku"}
        assert example.rejected is not None
    for language in examples[0].prompts:
        texts = {example.prompts[language][0]["content"] for example in examples}
        assert len(texts) == len(examples), f"repeated prompt in {language}"
