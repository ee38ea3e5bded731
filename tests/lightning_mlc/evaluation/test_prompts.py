"""Prompt sets: every layout with and without responses, kinds, languages."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import example_rows, write_jsonl

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.prompts import choose_languages, conversations, read_prompt_sets


def multijail(path: Path) -> Path:
    """The columns of https://github.com/DAMO-NLP-SG/multilingual-safety-for-LLMs, including the byte-order mark."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "source", "en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv", "tags"])
        writer.writerow(
            [0, "somebody", "one,\nquoted", "一", "uno", "một", "واحد", "일", "หนึ่ง", "এক", "moja", "siji", "['a']"]
        )
        writer.writerow([1, "somebody", "two", "二", "due", "", "اثنان", "이", "สอง", "দুই", "mbili", "loro", "['b']"])
    return path


def test_multijail_is_read_with_its_byte_order_mark(tmp_path: Path) -> None:
    (found,) = read_prompt_sets([str(multijail(tmp_path / "MultiJail.csv"))], [], "en")
    assert (found.name, found.kind, [row.id for row in found.rows]) == ("MultiJail", "harmful", ["0", "1"])
    assert found.languages() == ("en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv")
    assert found.rows[0].prompts["en"] == [{"role": "user", "content": "one,\nquoted"}]
    assert "vi" not in found.rows[1].prompts  # an empty cell
    assert found.rows[0].chosen is None


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "ours": ({"prompt": {"en": "a", "sw": "b", "ur": None}}, {"en": "a", "sw": "b"}),
    "flat": ({"prompt_en": "a", "prompt_sw": "b"}, {"en": "a", "sw": "b"}),
    "authors": (
        {"prompt": [{"from": "human", "value": "a"}], "prompt_sw": [{"from": "human", "value": "b"}]},
        {"en": "a", "sw": "b"},
    ),
    "alpaca": ({"instruction": "a", "input": "c", "prompt_sw": "b", "output": "d"}, {"en": "a\nc", "sw": "b"}),
    "columns": ({"id": 3, "tags": "x", "EN": "a", "sw": "b"}, {"en": "a", "sw": "b"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_needs_responses(layout: str, tmp_path: Path) -> None:
    row, expected = LAYOUTS[layout]
    (found,) = read_prompt_sets([str(write_jsonl(tmp_path / "p.jsonl", [row]))], [], "en")
    assert {language: messages[-1]["content"] for language, messages in found.rows[0].prompts.items()} == expected


def test_pairs_come_along(tmp_path: Path) -> None:
    (found,) = read_prompt_sets([str(write_jsonl(tmp_path / "p.jsonl", example_rows(2)))], [], "en")
    assert (found.rows[1].chosen, found.rows[1].rejected) == ("No, bag 1 is not yours.", "Sure, take bag 1.")


def test_a_row_says_of_what_kind_it_is(tmp_path: Path) -> None:
    rows = [{"prompt": {"en": f"q{i}"}, "kind": kind} for i, kind in enumerate(["harmful", "ordinary", None])]
    path = str(write_jsonl(tmp_path / "mixed.jsonl", rows))
    assert [(part.name, part.kind, len(part.rows)) for part in read_prompt_sets([path], [], "en")] == [
        ("mixed", "harmful", 2),
        ("mixed-ordinary", "ordinary", 1),
    ]
    assert [(part.kind, len(part.rows)) for part in read_prompt_sets([], [path], "en")] == [
        ("harmful", 1),
        ("ordinary", 2),
    ]


def test_the_sample_has_both_kinds() -> None:
    assert [(part.kind, len(part.rows)) for part in read_prompt_sets(["sample"], [], "en")] == [
        ("harmful", 42),
        ("ordinary", 66),
    ]
    assert [len(part.rows) for part in read_prompt_sets(["sample"], [], "en", limit=4)] == [4, 4]


def test_files_of_one_name_make_sets_of_two(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [str(write_jsonl(folder / "p.jsonl", [{"prompt_en": "a"}])) for folder in (tmp_path, tmp_path / "b")]
    assert [part.name for part in read_prompt_sets(paths, [], "en")] == ["p", "p-2"]


def test_every_prompt_in_every_language_that_it_has(tmp_path: Path) -> None:
    sets = read_prompt_sets([str(multijail(tmp_path / "m.csv"))], [], "en")
    asked = [key for key, _ in conversations(sets, choose_languages(sets, ["vi", "en"]))]
    assert asked == [("m", "0", "vi"), ("m", "0", "en"), ("m", "1", "en")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"prompt": {"tlh1": "a"}}], "p.jsonl row 1: 'tlh1' is not a language code"),
        ([{"prompt": {"en": None}}], "p.jsonl row 1: has no prompt in any language"),
        ([{"text": "a"}], "p.jsonl row 1: has no prompt"),
        (
            [{"id": 1, "prompt_en": "a"}, {"id": 1, "prompt_en": "b"}],
            "p.jsonl row 2: the id '1' is taken by p.jsonl row 1",
        ),
        ([{"prompt_en": "a", "chosen": "b", "rejected": 3}], "'rejected' must be a string"),
    ],
)
def test_bad_rows_are_named(content: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_prompt_sets([str(write_jsonl(tmp_path / "p.jsonl", content))], [], "en")
    assert message in str(refused.value)


def test_a_language_that_nothing_is_in_is_refused(tmp_path: Path) -> None:
    sets = read_prompt_sets([str(write_jsonl(tmp_path / "p.jsonl", [{"prompt_en": "a"}]))], [], "en")
    with pytest.raises(UserError, match=r"languages: no prompt is in 'sw' \(found: en\)"):
        choose_languages(sets, ["en", "sw"])
    with pytest.raises(UserError, match="languages: 'klingon1' is not a language code"):
        choose_languages(sets, ["klingon1"])


def test_responses_that_are_no_pair_are_of_no_use(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt_en": "a", "response": "b"}]))
    assert read_prompt_sets([str(path)], [], "en")[0].rows[0].chosen is None


def test_a_kind_that_is_neither_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": {"en": "q"}, "kind": "Ordinary"}])
    with pytest.raises(UserError, match=r"asked\.jsonl row 1: 'kind' must be harmful or ordinary, .* got 'Ordinary'"):
        read_prompt_sets([str(path)], [], "en")


def test_no_two_sets_share_a_name(tmp_path: Path) -> None:
    rows = [{"prompt": {"en": "q"}}, {"prompt": {"en": "r"}, "kind": "ordinary"}]
    first = write_jsonl(tmp_path / "x-ordinary.jsonl", rows[:1])
    both = write_jsonl(tmp_path / "x.jsonl", rows)
    names = [part.name for part in read_prompt_sets([str(first), str(both)], [], "en")]
    assert names == ["x-ordinary", "x", "x-ordinary-2"]


def test_half_a_character_is_refused_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": {"en": "ok \\ud83d"}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"asked\.jsonl row 1.* contains an unpaired surrogate"):
        read_prompt_sets([str(path)], [], "en")
