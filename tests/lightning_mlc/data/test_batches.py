"""The contents of a batch in each stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mlc.data.batches import Normalizers
from lightning_mlc.data.collation import Collator
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.data.rows import CHOSEN, MISMATCHED, NO_RESPONSE, REJECTED, TokenRows

NORMALIZERS = Normalizers(1, 1, 1, 1, 1)


NONE: dict[str, list[Any]] = {"translated": [], "translated_chosen": [], "translated_rejected": []}
EXAMPLES: list[dict[str, Any]] = [
    {"id": "a", "languages": [0, 2], "prompts": [[1], [2, 2]], "chosen": [7], "rejected": [8, 8], "ordinary": True}
    | NONE,
    {
        "id": "b",
        "languages": [0, 1, 2],
        "prompts": [[3], [4], [5]],
        "chosen": [7, 7],
        "rejected": [8],
        "ordinary": False,
        "translated": [2],
        "translated_chosen": [[71, 72]],
        "translated_rejected": [[81, 82, 83]],
    },
]


def places(blocks: tuple[TokenRows, ...]) -> set[tuple[int, int, int]]:
    return {
        place
        for block in blocks
        for place in zip(block.example.tolist(), block.language.tolist(), block.kind.tolist(), strict=True)
    }


LAYOUTS = pytest.mark.parametrize("layout", [Layout(), Layout(packed=True)], ids=["padded", "packed"])


@LAYOUTS
def test_training_runs_the_pair_in_the_source_language_only(layout: Layout) -> None:
    batch = Collator(("en", "sw", "zh"), 0, RowPlan(True), layout).training(EXAMPLES, [4, 6], NORMALIZERS)
    assert batch.ids == ("a", "b")
    assert batch.keys.tolist() == [4, 6]
    assert batch.is_ordinary is not None
    assert batch.is_ordinary.tolist() == batch.to("cpu").is_ordinary.tolist() == [True, False]
    assert places(batch.responses) == {(0, 0, CHOSEN), (0, 0, REJECTED), (1, 0, CHOSEN), (1, 0, REJECTED)}
    assert places(batch.prompts) == {(0, 2, NO_RESPONSE), (1, 1, NO_RESPONSE), (1, 2, NO_RESPONSE)}
    assert batch.without_translations().prompts == ()


def test_responses_in_all_languages_or_in_none() -> None:
    everywhere = Collator(("en", "sw", "zh"), 0, RowPlan(True, "all"), Layout()).training(EXAMPLES, [4, 6], NORMALIZERS)
    source = {(0, 0, CHOSEN), (0, 0, REJECTED), (1, 0, CHOSEN), (1, 0, REJECTED)}
    assert places(everywhere.responses) == source
    others = {(0, 2), (1, 1), (1, 2)}
    assert places(everywhere.translations) == {(*cell, kind) for cell in others for kind in (CHOSEN, REJECTED)}
    assert everywhere.prompts == ()
    off = everywhere.without_translations()
    assert (off.responses, off.translations) == (everywhere.responses, ())
    nowhere = Collator(("en", "sw", "zh"), 0, RowPlan(True, "none"), Layout()).training(EXAMPLES, [4, 6], NORMALIZERS)
    assert nowhere.responses == nowhere.translations == ()
    assert places(nowhere.prompts) == {(*cell, NO_RESPONSE) for cell in others | {(0, 0), (1, 0)}}


def test_a_language_s_own_responses_follow_its_prompt() -> None:
    """In training and evaluation, a language without its own responses has those of the source language."""
    collator = Collator(("en", "sw", "zh"), 0, RowPlan(True, "all"), Layout())
    training, evaluation = (make(EXAMPLES, [4, 6], NORMALIZERS) for make in (collator.training, collator.evaluation))
    expected = {
        (0, 0, CHOSEN): [1, 7],
        (0, 0, REJECTED): [1, 8, 8],
        (0, 2, CHOSEN): [2, 2, 7],
        (0, 2, REJECTED): [2, 2, 8, 8],
        (1, 0, CHOSEN): [3, 7, 7],
        (1, 0, REJECTED): [3, 8],
        (1, 1, CHOSEN): [4, 7, 7],
        (1, 1, REJECTED): [4, 8],
        (1, 2, CHOSEN): [5, 71, 72],
        (1, 2, REJECTED): [5, 81, 82, 83],
    }
    for blocks in ((*training.responses, *training.translations), evaluation.responses):
        found = {
            (int(block.example[i]), int(block.language[i]), int(block.kind[i])): block.input_ids[i][
                block.attention_mask[i] == 1
            ].tolist()
            for block in blocks
            for i in range(len(block))
        }
        assert found == expected


@LAYOUTS
def test_evaluation_asks_in_every_language(layout: Layout) -> None:
    batch = Collator(("en", "sw", "zh"), 0, RowPlan(True), layout).evaluation(EXAMPLES, [0, 1], NORMALIZERS)
    cells = {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)}
    assert places(batch.responses) == {(*cell, kind) for cell in cells for kind in (CHOSEN, REJECTED)}
    assert batch.prompts == ()


def test_rejected_rows_are_left_out_where_no_one_needs_them() -> None:
    collator = Collator(("en", "sw", "zh"), 0, RowPlan(False), Layout())
    for batch in (collator.training(EXAMPLES, [0, 1], NORMALIZERS), collator.evaluation(EXAMPLES, [0, 1], NORMALIZERS)):
        assert all((block.kind != REJECTED).all() for block in batch.responses)


UNPAIRED: list[dict[str, Any]] = [
    {
        "id": "a",
        "languages": [0, 2],
        "prompts": [[1], [2, 2]],
        "chosen": [7],
        "rejected": [],
        "ordinary": False,
        **NONE,
    },
    {
        "id": "b",
        "languages": [0, 1],
        "prompts": [[3], [4]],
        "chosen": [],
        "rejected": [8],
        "ordinary": False,
        **NONE,
    },
]
OTHERS = [[9, 9], [7]]
"""Responses to other prompts."""


def test_unpaired_examples_have_the_row_that_they_have() -> None:
    collator = Collator(("en", "sw", "zh"), 0, RowPlan(True), Layout())
    for batch, places_of in (
        (collator.training(UNPAIRED, [0, 1], NORMALIZERS, OTHERS), {(0, 0, CHOSEN), (1, 0, REJECTED)}),
        (
            collator.evaluation(UNPAIRED, [0, 1], NORMALIZERS, OTHERS),
            {(0, 0, CHOSEN), (0, 2, CHOSEN), (1, 0, REJECTED), (1, 1, REJECTED)},
        ),
    ):
        assert places(batch.responses) == places_of
        # A response to another prompt, after the prompt in the source language only.
        assert places(batch.mismatched) == {(0, 0, MISMATCHED), (1, 0, MISMATCHED)}
        assert sorted(ids for rows in batch.mismatched for ids in rows.input_ids.tolist()) == [[1, 9, 9], [3, 7, 0]]
        assert batch.without_translations().mismatched == batch.mismatched


def test_a_prompt_s_only_response_is_run_even_where_no_one_needs_it() -> None:
    """The row of the chosen response has the prompt's hidden state."""
    batch = Collator(("en", "sw", "zh"), 0, RowPlan(False), Layout()).training(UNPAIRED, [0, 1], NORMALIZERS)
    assert places(batch.responses) == {(0, 0, CHOSEN), (1, 0, REJECTED)}


@LAYOUTS
def test_prediction_has_padded_prompts_alone(layout: Layout) -> None:
    batch = Collator(("en", "sw", "zh"), 0, RowPlan(True), layout).prediction(EXAMPLES, [0, 1], NORMALIZERS)
    assert batch.responses == ()
    assert all(block.packing is None for block in batch.prompts)
    assert len(places(batch.prompts)) == 5


@pytest.mark.parametrize("name", ["responses", "prompts", "translations", "mismatched"])
@LAYOUTS
def test_moving_a_batch_moves_every_tensor(name: str, layout: Layout) -> None:
    collator = Collator(("en", "sw", "zh"), 0, RowPlan(True, "all" if name == "translations" else "source"), layout)
    batch = collator.training(UNPAIRED, [0, 1], NORMALIZERS, OTHERS).to("meta")
    assert batch.keys.device.type == "meta"
    assert getattr(batch, name)
    for rows in getattr(batch, name):
        holders = [rows] if rows.packing is None else [rows, rows.packing]
        tensors = [value for holder in holders for value in vars(holder).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (15 if rows.packing is None else 18)
        assert all(tensor.device.type == "meta" for tensor in tensors)
