"""Token counts of examples, by hand. The test tokenizer has one token per byte; its template adds four to a prompt."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_jsonl

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.row_plan import ResponsesIn, RowPlan
from lightning_mlc.errors import UserError


def row(en: int, sw: int | None, zh: int | None, chosen: int, rejected: int) -> dict[str, Any]:
    """A row whose prompts and responses have these numbers of tokens, including the template and the end token."""
    prompts = {"en": en, "sw": sw, "zh": zh}
    return {
        "prompt": {name: None if tokens is None else "x" * (tokens - 4) for name, tokens in prompts.items()},
        "chosen": "y" * (chosen - 1),
        "rejected": "z" * (rejected - 1),
    }


def ready(model: Path, path: Path, **options: Any) -> MultilingualData:
    data = MultilingualData(train_path=str(path), name_or_path=str(model), val_share=0, **options)
    data.prepare_data()
    data.setup("fit")
    return data


ROWS = [row(10, 40, 15, 5, 7), row(10, None, 15, 6, 8), row(20, 80, None, 9, 3)]


def test_tokens_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    counts = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", ROWS))._counts("train")
    assert counts.prompts.tolist() == [[10, 40, 15], [10, 0, 15], [20, 80, 0]]
    assert counts.chosen[:, 0].tolist() == [5, 6, 9]
    assert counts.rejected[:, 0].tolist() == [7, 8, 3]
    # Two rows of the source, each with the prompt, plus the translations.
    assert counts.in_step(RowPlan(True, translations=True)).tolist() == [[32, 40, 15], [34, 0, 15], [52, 80, 0]]
    assert counts.in_step(RowPlan(False, translations=True)).tolist() == [[15, 40, 15], [16, 0, 15], [29, 80, 0]]
    assert counts.in_step(RowPlan(True, translations=False)).tolist() == [[32, 0, 0], [34, 0, 0], [52, 0, 0]]
    assert counts.in_step(RowPlan(True, "none")).tolist() == counts.prompts.tolist()
    # The source's responses after every prompt, and each prompt twice.
    assert counts.in_step(RowPlan(True, "all")).tolist() == [[32, 92, 42], [34, 0, 44], [52, 172, 0]]
    # Only prompts in both languages: 120 / 30 and 30 / 20.
    assert counts.relative_to_source().tolist() == [1, 4, 1.5]
    assert np.isnan(counts.take([1]).relative_to_source()[1])


def test_responses_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    """If a language has its own responses, these follow its prompt. Otherwise the source's responses do."""
    first, second = row(10, 40, 15, 5, 7), row(20, 30, None, 9, 3)
    first["chosen"] = {"en": first["chosen"], "sw": "y" * 10}
    first["rejected"] = {"en": first["rejected"], "sw": "z" * 20}
    counts = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", [first, second]))._counts("train")
    assert counts.chosen.tolist() == [[5, 11, 5], [9, 9, 9]]
    assert counts.rejected.tolist() == [[7, 21, 7], [3, 3, 3]]
    assert counts.in_step(RowPlan(False, "all")).tolist() == [[15, 51, 20], [29, 39, 0]]
    # Four positions of the source's response are compared. Where the language has its own, they take another row.
    four = RowPlan(False, "all", positions=4)
    assert counts.in_step(four).tolist() == [[15, 51 + 43, 20], [29, 39, 0]]
    assert counts.in_step(RowPlan(False, "all", positions=1)).tolist() == [[15, 51, 20], [29, 39, 0]]
    assert counts.in_step(RowPlan(False, "none", positions=7)).tolist() == [[14, 44, 19], [26, 36, 0]]


def test_undesirable_responses_are_run_all_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """For rows with one labelled response each."""
    prompt = row(10, 12, 15, 1, 1)["prompt"]
    rows = [{"prompt": prompt, "response": "y" * 4, "label": True}, {"prompt": prompt, "response": "z", "label": False}]
    counts = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows))._counts("train")
    for rejected in (True, False):
        assert counts.in_step(RowPlan(rejected, translations=True)).tolist() == [[15, 12, 15], [12, 12, 15]]


@pytest.mark.parametrize("responses_in", ["none", "source", "all"])
@pytest.mark.parametrize(("rejected", "positions"), [(True, 0), (False, 0), (False, 1), (True, 4)])
def test_counts_are_those_of_the_batches(
    tiny_model: Path, tmp_path: Path, rejected: bool, positions: int, responses_in: ResponsesIn
) -> None:
    rows = [*ROWS, {**row(10, 40, 15, 5, 7), "chosen": {"en": "y", "sw": "yy"}, "rejected": {"en": "z", "sw": "zzz"}}]
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows), batch_size=4)
    data.plan_rows(RowPlan(rejected, responses_in, positions=positions))
    (batch,) = data.train_dataloader()
    found = np.zeros((4, 3), dtype=int)
    for block in (*batch.responses, *batch.translations, *batch.prompts):
        for example, language, tokens in zip(block.example, block.language, block.attention_mask.sum(1), strict=True):
            found[batch.keys[example], language] += int(tokens)
    assert found.tolist() == data._counts("train").in_step(data.plan).tolist()


def many_rows(count: int) -> list[dict[str, Any]]:
    """Rows of a few to several hundred tokens, some without a translation."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(3, 0.8, size=(count, 5)), 6, 120).astype(int).tolist()
    return [row(en, sw, zh if i % 3 else None, a, a + 1 + b) for i, (en, sw, zh, a, b) in enumerate(lengths)]


LAYOUTS = {
    "padded": (Layout(), 4 / 3),
    "packed": (Layout(packed=True), 2),
    "packed, prompts repeated": (Layout(packed=True, share_prompts=False), 2),
    "one row": (Layout(packed=True, one_row=True), 1),
}
"""Layouts, and the factor by which the computed tokens may exceed the budget (docs/data.md)."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rejected", "responses_in", "translations"),
    [
        (True, "source", True),
        (False, "source", True),
        (True, "source", False),
        (True, "all", True),
        (True, "none", True),
    ],
)
def test_memory_is_bounded(
    tiny_model: Path, tmp_path: Path, rejected: bool, responses_in: ResponsesIn, translations: bool, layout: str
) -> None:
    """In real batches, tokens stay within the budget, and with padding within a factor of it."""
    budget = 1500 if responses_in == "all" else 900
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", many_rows(60)), tokens_per_batch=budget)
    data.plan_rows(RowPlan(rejected, responses_in, translations))
    data.check_steps()
    data.layout, factor = LAYOUTS[layout]
    ids: list[str] = []
    used = []
    for batch in data.train_dataloader():
        assert isinstance(batch, Batch)
        run = batch if translations else batch.without_translations()
        blocks = [*run.responses, *run.translations, *run.prompts]
        tokens = sum(int(block.attention_mask.sum()) for block in blocks)
        assert tokens <= budget
        assert sum(block.input_ids.numel() for block in blocks) <= budget * factor
        assert torch.unique(torch.cat([block.example for block in blocks])).tolist() == list(range(len(batch)))
        ids += batch.ids
        used.append(tokens / budget)
    assert len(ids) == len(set(ids)) == 60
    # The budget is also used: less by rows that share prompts, because it counts a shared prompt for each row.
    assert sum(used) / len(used) > (0.5 if data.layout.packed and data.layout.share_prompts else 0.7)


def test_what_steps_do_not_run_leaves_room(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", many_rows(40))

    def batches(rejected: bool, translations: bool) -> int:
        data = ready(tiny_model, path, tokens_per_batch=900)
        data.plan_rows(RowPlan(rejected, translations=translations))
        data.check_steps()
        return len(list(data.train_dataloader()))

    assert batches(True, True) > batches(False, True) > batches(False, False)


def test_an_example_that_exceeds_the_budget_alone(tiny_model: Path, tmp_path: Path) -> None:
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", ROWS), tokens_per_batch=80)
    message = (
        r"data\.tokens_per_batch: 80 is less than the 132 tokens of a\.jsonl row 3 alone \(most in sw 80, en 52; "
        r"2 examples have too many\); raise it to 132, lower data\.max_prompt_length or data\.max_response_length, "
        r"or drop languages \(data\.languages\)"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        data.check_steps()
    data.plan_rows(RowPlan(translations=False))
    data.check_steps()  # at most 52


def test_expensive_languages_are_named_once(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", ROWS))
    with caplog.at_level(logging.WARNING, logger="lightning_mlc"):
        data.plan_rows(RowPlan(translations=False))
        data.check_steps()
        assert not caplog.records
        data.plan_rows(RowPlan(translations=True))
        data.check_steps()
    (record,) = caplog.records
    # 120 of 268 tokens
    assert record.getMessage().startswith("prompts in sw (4.0 times, 45% of a step's tokens) take several times")
    assert "xxx" not in caplog.text
    caplog.clear()
    data = ready(tiny_model, write_jsonl(tmp_path / "b.jsonl", [row(10, 29, 15, 5, 7)]))
    with caplog.at_level(logging.WARNING, logger="lightning_mlc"):
        data.plan_rows(RowPlan(translations=True))
        data.check_steps()
    assert not caplog.records


def test_one_way_to_size_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    assert MultilingualData().batch_size == 1
    with pytest.raises(UserError, match=r"data\.tokens_per_batch: cannot be given together with data\.batch_size 2"):
        MultilingualData(batch_size=2, tokens_per_batch=100)
    with pytest.raises(UserError, match=r"data\.tokens_per_batch: must be at least 1"):
        MultilingualData(tokens_per_batch=0)
