"""Prompts of the plug-in: every layout, the languages, the order of the steps, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, byte_tokenizer, example_rows, write_jsonl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lightning_mlc.errors import UserError
from lightning_mlc.plugins.datasets import mlc_dataset
from lightning_mlc.plugins.prompts import PromptGroups, prompts_of_step, share_of

ROWS = [
    {"en": "Where is it?", "sw": "Iko wapi?", "zh": "在哪里？"},
    {"en": "Who is it?", "sw": "Ni nani?"},
    {"en": "Why?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def texts(groups: PromptGroups, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, str]]:
    """The groups as text, so that a test can read them."""
    found: list[dict[str, str]] = [{} for _ in range(len(groups))]
    for sequence in groups.sequences(range(len(groups))):
        found[sequence.example][groups.languages[sequence.language]] = tokenizer.decode(sequence.prompt)
    return found


def rendered(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


MESSAGES = [
    {"prompt": [{"role": "user", "content": row["en"]}], "translations": {"sw": row.get("sw"), "zh": row.get("zh")}}
    for row in ROWS
]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [{"prompt": row} for row in ROWS],
        [{f"prompt_{code}": text for code, text in row.items()} for row in ROWS],
        [{"prompt": row["en"], **{f"prompt_{c}": t for c, t in row.items() if c != "en"}} for row in ROWS],
        [{"prompt": row["en"], "translations": {c: t for c, t in row.items() if c != "en"}} for row in ROWS],
        MESSAGES,
    ],
    ids=["languages", "nested", "columns", "source without suffix", "translations", "messages"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["list", "dataset", "file"])
def test_every_layout_gives_the_same_prompts(
    rows: list[dict[str, Any]], form: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given: Any = rows
    if form == "dataset":
        given = Dataset.from_list(rows)
    elif form == "file":
        given = write_jsonl(tmp_path / "prompts.jsonl", rows)
    groups = PromptGroups(given, tokenizer)
    assert groups.languages == ("en", "sw", "zh")
    assert groups.left_out == 1
    assert texts(groups, tokenizer) == [
        {code: rendered(tokenizer, text) for code, text in row.items()} for row in ROWS[:2]
    ]


def test_languages_can_be_chosen(tokenizer: PreTrainedTokenizerFast) -> None:
    groups = PromptGroups(ROWS, tokenizer, languages=["zh", "en"])
    assert groups.languages == ("en", "zh")
    assert [set(row) for row in texts(groups, tokenizer)] == [{"en", "zh"}]
    assert groups.left_out == 2


def test_a_long_prompt_is_cut_and_keeps_its_template(tokenizer: PreTrainedTokenizerFast) -> None:
    header = len(tokenizer(rendered(tokenizer, ""))["input_ids"])
    groups = PromptGroups([{"en": "a" * 90, "sw": "b"}], tokenizer, max_prompt_length=header + 5)
    assert groups.longest == header + 5
    assert texts(groups, tokenizer) == [{"en": rendered(tokenizer, "aaaaa"), "sw": rendered(tokenizer, "b")}]


def test_our_files_become_columns_of_trl_and_prompts_again(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = example_rows(3)
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    table = mlc_dataset(file)
    assert table[0] == {
        "id": "r0",
        "prompt": [{"role": "user", "content": rows[0]["prompt"]["en"]}],
        "chosen": [{"role": "assistant", "content": rows[0]["chosen"]}],
        "rejected": [{"role": "assistant", "content": rows[0]["rejected"]}],
        "translations": {
            code: [{"role": "user", "content": rows[0]["prompt"][code]}] for code in ("sw", "zh")
        },
    }  # fmt: skip
    assert texts(PromptGroups(table, tokenizer), tokenizer) == texts(PromptGroups(file, tokenizer), tokenizer)


def test_single_and_labelled_responses_become_completions(tmp_path: Path) -> None:
    rows = example_rows(2, pairs=False)
    single = mlc_dataset(write_jsonl(tmp_path / "single.jsonl", rows))
    assert single[0]["completion"] == [{"role": "assistant", "content": rows[0]["response"]}]
    assert "label" not in single.column_names
    labelled = [{**row, "label": number == 0} for number, row in enumerate(rows)]
    table = mlc_dataset(write_jsonl(tmp_path / "labelled.jsonl", labelled))
    assert table["label"] == [True, False]
    assert table[1]["completion"] == [{"role": "assistant", "content": rows[1]["response"]}]


# ---- the order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "per_step"), [(10, 4), (7, 7), (5, 3), (1, 1), (64, 1)])
def test_epochs_use_every_prompt_once_before_any_twice(count: int, per_step: int) -> None:
    steps = 3 * count
    drawn = [index for step in range(steps) for index in prompts_of_step(count, per_step, 1, step)]
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_order_depends_on_the_seed_and_on_the_epoch() -> None:
    first = prompts_of_step(50, 50, 1, 0)
    assert first == prompts_of_step(50, 50, 1, 0)
    assert first != prompts_of_step(50, 50, 2, 0)
    assert first != prompts_of_step(50, 50, 1, 1)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 20])
def test_shares_divide_a_step(parts: int) -> None:
    step = list(range(7))
    shares = [share_of(step, part, parts) for part in range(parts)]
    assert [index for share in shares for index in share] == step
    sizes = Counter(map(len, shares))
    assert max(sizes) - min(sizes) <= 1


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"en": "Why?"}], {}, "prompts: has prompts in 'en' alone; add translations"),
        (
            [{"en": "Why?"}, {"sw": "Kwa nini?", "en": None}],
            {},
            "prompts: has no prompt in two or more of the languages en, sw; give prompts with translations",
        ),
        (ROWS, {"languages": ["en"]}, "languages: must be two or more, because the loss compares them; got en"),
        (ROWS, {"languages": ["en", "fr"]}, r"languages: no row has a prompt in 'fr' \(found: en, sw, zh\)"),
        (ROWS, {"languages": ["en", "xx-klingon!"]}, "languages: 'xx-klingon!' is not a language code"),
        (ROWS, {"languages": []}, "languages: must be two or more, because the loss compares them; got none"),
        (ROWS, {"languages": "en"}, r"languages: must be a list such as \[en, sw\], got 'en'"),
        (ROWS, {"max_prompt_length": 3}, r"prompts row 1 \(en\): max_prompt_length 3 leaves no room in addition to"),
        (["Why?"], {}, "prompts row 1: must be a mapping such as"),
        ([{"text": "Why?"}], {}, "prompts row 1: has no prompt"),
        ([{"en": "Why?", "sw": ""}], {}, "prompts row 1: the prompt in 'sw' is empty"),
        ([{"prompt": "a", "translations": "b"}], {}, "prompts row 1: 'translations' must hold one text per language"),
        ([], {}, "prompts: has no prompts; give at least one"),
        ([{"en": None, "sw": None}], {}, "prompts: has no prompts; give at least one"),
        (None, {}, "prompts: must be a file, a data set or a list of rows, got NoneType"),
        ({"train": ROWS}, {}, "prompts: must be a file, a data set or a list of rows, got dict"),
    ],
)
def test_bad_prompts_are_refused(
    rows: Any, options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        PromptGroups(rows, tokenizer, **options)


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(UserError, match=r"^tokenizer: the tokenizer of .* has no chat template"):
        PromptGroups(ROWS, byte_tokenizer(None))


def test_a_broken_row_of_a_file_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n{\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^prompts.jsonl row 2"):
        PromptGroups(file, tokenizer)


def test_a_template_that_refuses_a_prompt_names_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    refusing = TEMPLATE + "{% if messages[0]['content'] == 'Iko wapi?' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(UserError, match=r"^prompts row 1 \(sw\): the chat template"):
        PromptGroups(ROWS, byte_tokenizer(refusing))
