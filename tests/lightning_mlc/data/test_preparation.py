"""Tables do not depend on the number of processes, and each process names a faulty row."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import TEMPLATE, byte_tokenizer, example_rows, labelled_rows, save_model, translated_rows, write_jsonl

from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.preparation import MOST_PROCESSES, Encoder, encode_in_order, processes_for
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Example
from lightning_mlc.data.spool import ROWS, Spool, example_of
from lightning_mlc.data.tables import COLUMNS, TABLE, table_fingerprint, tokenised_table
from lightning_mlc.data.tokenization import ChatTokenizer, PromptTooLong
from lightning_mlc.errors import UserError


def chat(template: str = TEMPLATE, limit: int = 60) -> ChatTokenizer:
    return ChatTokenizer(byte_tokenizer(template), limit, 30, "cut")


def spool_of(rows: list[dict[str, object]], folder: Path) -> Spool:
    path = str(write_jsonl(folder / "a.jsonl", rows))
    return Spool.write(parse_rows(read_rows(path, "data.train_path"), "en"), folder / "spool")


@pytest.fixture
def many(tmp_path: Path) -> Spool:
    """More rows than are tokenised together, with everything that rows can have."""
    assert ROWS < 600
    return spool_of(translated_rows(600), tmp_path)


def test_a_spool_gives_back_what_was_written(tmp_path: Path, many: Spool) -> None:
    path = str(tmp_path / "a.jsonl")
    examples = list(parse_rows(read_rows(path, "data.train_path"), "en"))
    assert [len(part) for part in many.read()] == [256, 256, 88]
    assert [example_of(text) for part in many.read() for text in part] == examples
    assert (many.rows, many.kind, many.languages) == (600, "pairs", ("en", "sw", "zh"))


def test_a_spool_reads_no_further_than_it_writes(tmp_path: Path) -> None:
    """A million rows must not be in memory: when the third part is requested, the first is in the file."""
    sizes = []

    def examples() -> Iterator[Example]:
        for i in range(2 * ROWS + 1):
            if i % ROWS == 0:
                sizes.append((tmp_path / "spool").stat().st_size)
            yield Example(f"e{i}", f"row {i}", {"en": [{"role": "user", "content": "x" * 1000}]}, "Yes.", None)

    Spool.write(examples(), tmp_path / "spool")
    assert [size // (1000 * ROWS) for size in sizes] == [0, 1, 2]


def test_the_table_does_not_depend_on_the_number_of_processes(tmp_path: Path, many: Spool) -> None:
    alone, two = (tokenised_table(many, ("en", "sw", "zh"), chat(), tmp_path / str(n), num_proc=n) for n in (1, 2))
    assert table_fingerprint(alone) == table_fingerprint(two)
    files = [tmp_path / str(n) / "tokenised" / table_fingerprint(alone) / TABLE for n in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(alone) == 600
    assert alone[599] == chat().encode(example_of(list(many.read())[-1][-1]), ("en", "sw", "zh"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_row_is_named_from_any_process(tmp_path: Path, processes: int) -> None:
    """The first of two errors is reported. The rest is not awaited, and nothing is left behind."""
    rows = example_rows(900)
    for number in (300, 700):
        rows[number]["prompt"] = {**rows[number]["prompt"], "sw": "WRONG"}  # type: ignore[dict-item]
    refusing = TEMPLATE.replace("<|{{", "{% if m['content'] == 'WRONG' %}{{ raise_exception('no') }}{% endif %}<|{{")
    spool = spool_of(rows, tmp_path)
    with pytest.raises(UserError) as told:
        tokenised_table(spool, ("en", "sw", "zh"), chat(refusing), tmp_path / "cache", num_proc=processes)
    assert told.value.option == "a.jsonl row 301 (sw)"
    assert told.value.text == (
        "the chat template of the model refuses this prompt (no); change the row, or the template"
    )
    assert not list((tmp_path / "cache" / "tokenised").iterdir())


def test_kinds_of_errors_cross_processes(tmp_path: Path, many: Spool) -> None:
    strict = ChatTokenizer(byte_tokenizer(), 40, 30, "error")
    with pytest.raises(
        PromptTooLong, match=r"^a\.jsonl row 1 \(en\): the prompt has \d+ tokens, data\.max_prompt_leng"
    ):
        tokenised_table(many, ("en", "sw", "zh"), strict, tmp_path / "cache", num_proc=2)


def test_what_encodes_can_be_sent_to_a_process_that_was_not_forked(many: Spool) -> None:
    """The start method of macOS and Windows, also after it was used."""
    encoder = Encoder(chat(), ("en", "sw", "zh"), COLUMNS.arrow_schema)
    part = next(many.read())
    here = encoder.encode(part)
    assert pickle.loads(pickle.dumps(encoder)).encode(part).equals(here)


class Stuck(Encoder):
    """Reports through a pipe that it works, and never ends."""

    def encode(self, written: list[bytes]) -> pyarrow.RecordBatch:
        os.write(int(self.languages[0]), b".")
        while True:
            time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs forks")
def test_processes_end_with_the_one_that_started_them() -> None:
    """However the parent ends. The workers would otherwise wait for work forever, and keep its memory."""
    end, begin = os.pipe()
    stuck = Stuck(chat(), (str(begin),), COLUMNS.arrow_schema)
    parts: list[list[bytes]] = [[], []]
    context = multiprocessing.get_context("fork")
    starter = context.Process(target=lambda: list(encode_in_order(stuck, parts, 2)))
    starter.start()
    os.close(begin)
    try:
        assert os.read(end, 1) + os.read(end, 1) == b".."
        starter.kill()
        starter.join()
        # The pipe ends when no process is left that could write to it.
        assert select.select([end], [], [], 30)[0] == [end]
        assert os.read(end, 1) == b""
    finally:
        os.close(end)


def test_few_rows_take_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mlc.data.preparation._cores", lambda: 64)
    assert [processes_for(rows, None) for rows in (1, 3999, 4000, 10**6)] == [1, 1, 2, MOST_PROCESSES]
    assert processes_for(1, 3) == 3


def test_the_option_reaches_the_table(tiny_model: Path, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", labelled_rows(300)))
    tables = []
    for processes in (1, 2):
        data = MultilingualData(
            path, name_or_path=str(tiny_model), num_proc=processes, cache_dir=str(tmp_path / f"cache{processes}")
        )
        data.prepare_data()
        tables.append(data._tables["train"])
    assert tables[0].to_list() == tables[1].to_list()
    with pytest.raises(UserError, match=r"^data\.num_proc: must be at least 1"):
        MultilingualData(num_proc=0)


def test_a_table_of_another_rendering_is_not_taken(tmp_path: Path) -> None:
    """The rendering depends on more than the text of the template."""
    spool = spool_of(example_rows(2), tmp_path)
    tables = []
    for name in ("a", "b"):
        tokenizer = byte_tokenizer("{{ bos_token }}" + TEMPLATE)
        tokenizer.bos_token = f"<|{name}|>"
        tables.append(tokenised_table(spool, ("en",), ChatTokenizer(tokenizer, 60, 30, "cut"), tmp_path))
    assert table_fingerprint(tables[0]) != table_fingerprint(tables[1])


def test_a_table_of_other_options_is_not_taken(tmp_path: Path) -> None:
    """Whether names of special tokens in a text count as these tokens or as text."""
    spool = spool_of([{**row, "chosen": "<|user|>"} for row in example_rows(2)], tmp_path)
    lengths = []
    for split in (False, True):
        tokenizer = byte_tokenizer()
        tokenizer.split_special_tokens = split
        table = tokenised_table(spool, ("en",), ChatTokenizer(tokenizer, 200, 30, "cut"), tmp_path)
        lengths.append(len(table[0]["chosen"]))
    assert lengths == [len(["<|user|>", "<|end|>"]), len("<|user|><|end|>")]


@pytest.mark.parametrize(("seed", "share"), [(1, 0.1), (2, 0.3), (3, 0.5)])
def test_the_split_is_that_of_groups_in_the_order_they_come(
    tiny_model: Path, tmp_path: Path, seed: int, share: float
) -> None:
    """The expected result, written with lists: groups of equal source prompts, in order, are drawn until they
    suffice."""
    rows = example_rows(60)
    for i, row in enumerate(rows):
        row["prompt"] = rows[(i * i) % 17]["prompt"]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    data = MultilingualData(path, name_or_path=str(tiny_model), seed=seed, val_share=share)
    data.prepare_data()
    data.setup("fit")
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["prompt"]["en"], []).append(i)
    held_out: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) < max(1, round(share * 60)):
            held_out += list(groups.values())[group]
    assert data.keys("val") == sorted(held_out)
    assert data.keys("train") == sorted(set(range(60)) - set(held_out))


def test_prompts_that_are_equal_once_they_are_cut_stay_on_one_side(tiny_model: Path, tmp_path: Path) -> None:
    rows = example_rows(20)
    for i, row in enumerate(rows):
        row["prompt"] = {"en": f"prompt {i % 2} " + "x" * 100 + str(i)}
    data = MultilingualData(
        str(write_jsonl(tmp_path / "a.jsonl", rows)), name_or_path=str(tiny_model), max_prompt_length=60, val_share=0.3
    )
    data.prepare_data()
    data.setup("fit")
    assert {key % 2 for key in data.keys("val")} ^ {key % 2 for key in data.keys("train")} == {0, 1}


def test_another_model_has_another_table(tiny_model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", template=TEMPLATE.replace("<|end|>\n", "<|end|>"))
    path = str(write_jsonl(tmp_path / "a.jsonl", example_rows(3)))
    found = set()
    for model in (tiny_model, other):
        data = MultilingualData(path, name_or_path=str(model))
        data.prepare_data()
        found.add(data.fingerprint("train"))
    assert len(found) == 2
