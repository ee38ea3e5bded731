"""Padding, blocks of similar length, and what a batch of each stage holds."""

from __future__ import annotations

import pytest
import torch

from lightning_mlc.data.batches import (
    CHOSEN,
    MISMATCHED,
    NO_RESPONSE,
    REJECTED,
    Normalizers,
    Row,
    TokenRows,
    pad_in_chunks,
)
from lightning_mlc.data.collation import Collator

NORMALIZERS = Normalizers(1, 1, 1, 1, 1)


def test_left_padding_aligns_responses() -> None:
    rows = TokenRows.pad([Row([1, 2], [3], 0, 0, CHOSEN), Row([4], [5, 6, 7], 0, 0, REJECTED)], pad_id=9)
    assert rows.input_ids.tolist() == [[9, 1, 2, 3], [4, 5, 6, 7]]
    assert rows.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert rows.prompt_end.tolist() == [2, 0]
    assert rows.response.tolist() == [3, 5, 6, 7]
    assert rows.logits_to_keep == 4  # from the end of the prompt of the longest response


def test_right_padding() -> None:
    rows = TokenRows.pad([Row([1, 2], [3], 0, 0, CHOSEN), Row([4, 5, 6, 7], [], 1, 2, NO_RESPONSE)], 9, side="right")
    assert rows.input_ids.tolist() == [[1, 2, 3, 9], [4, 5, 6, 7]]
    assert rows.prompt_end.tolist() == [1, 3]
    assert rows.response.tolist() == [2]
    assert rows.logits_to_keep == 3
    assert rows.language.tolist() == [0, 2]
    assert rows.example.tolist() == [0, 1]


def test_prompts_alone_keep_no_logits() -> None:
    assert TokenRows.pad([Row([1, 2], [], 0, 0, NO_RESPONSE)], 0).logits_to_keep == 0


def test_blocks_waste_little_and_lose_nothing() -> None:
    lengths = [3, 50, 4, 52, 51, 5, 200, 4]
    rows = [Row([1] * n, [], i, 0, NO_RESPONSE) for i, n in enumerate(lengths)]
    blocks = pad_in_chunks(rows, 0, max_waste=0.25)
    assert sorted(e for block in blocks for e in block.example.tolist()) == list(range(8))
    for block in blocks:
        assert block.attention_mask.float().mean() >= 0.75
    assert len(blocks) == 3
    limited = pad_in_chunks(rows, 0, max_tokens=110)
    assert max(block.input_ids.numel() for block in limited if len(block) > 1) <= 110
    assert pad_in_chunks([], 0) == ()


EXAMPLES = [
    {"id": "a", "languages": [0, 2], "prompts": [[1], [2, 2]], "chosen": [7], "rejected": [8, 8]},
    {"id": "b", "languages": [0, 1, 2], "prompts": [[3], [4], [5]], "chosen": [7, 7], "rejected": [8]},
]


def places(blocks: tuple[TokenRows, ...]) -> set[tuple[int, int, int]]:
    return {
        place
        for block in blocks
        for place in zip(block.example.tolist(), block.language.tolist(), block.kind.tolist(), strict=True)
    }


def test_training_runs_the_pair_in_the_source_language_only() -> None:
    batch = Collator(("en", "sw", "zh"), 0, with_rejected=True).training(EXAMPLES, [4, 6], NORMALIZERS)
    assert batch.ids == ("a", "b")
    assert batch.keys.tolist() == [4, 6]
    assert places(batch.responses) == {(0, 0, CHOSEN), (0, 0, REJECTED), (1, 0, CHOSEN), (1, 0, REJECTED)}
    assert places(batch.prompts) == {(0, 2, NO_RESPONSE), (1, 1, NO_RESPONSE), (1, 2, NO_RESPONSE)}
    assert batch.without_prompts().prompts == ()


def test_evaluation_asks_in_every_language() -> None:
    batch = Collator(("en", "sw", "zh"), 0, with_rejected=True).evaluation(EXAMPLES, [0, 1], NORMALIZERS)
    cells = {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)}
    assert places(batch.responses) == {(*cell, kind) for cell in cells for kind in (CHOSEN, REJECTED)}
    assert batch.prompts == ()


def test_rejected_rows_are_left_out_where_no_one_needs_them() -> None:
    collator = Collator(("en", "sw", "zh"), 0, with_rejected=False)
    for batch in (collator.training(EXAMPLES, [0, 1], NORMALIZERS), collator.evaluation(EXAMPLES, [0, 1], NORMALIZERS)):
        assert all((block.kind != REJECTED).all() for block in batch.responses)


UNPAIRED = [
    {"id": "a", "languages": [0, 2], "prompts": [[1], [2, 2]], "chosen": [7], "rejected": [], "mismatched": [9, 9]},
    {"id": "b", "languages": [0, 1], "prompts": [[3], [4]], "chosen": [], "rejected": [8], "mismatched": [7]},
]


def test_unpaired_examples_have_the_row_that_they_have() -> None:
    collator = Collator(("en", "sw", "zh"), 0, with_rejected=True)
    for batch, places_of in (
        (collator.training(UNPAIRED, [0, 1], NORMALIZERS), {(0, 0, CHOSEN), (1, 0, REJECTED)}),
        (
            collator.evaluation(UNPAIRED, [0, 1], NORMALIZERS),
            {(0, 0, CHOSEN), (0, 2, CHOSEN), (1, 0, REJECTED), (1, 1, REJECTED)},
        ),
    ):
        assert places(batch.responses) == places_of
        # A response to another prompt, after the prompt in the source language only.
        assert places(batch.mismatched) == {(0, 0, MISMATCHED), (1, 0, MISMATCHED)}
        assert sorted(ids for rows in batch.mismatched for ids in rows.input_ids.tolist()) == [[0, 3, 7], [1, 9, 9]]
        assert batch.without_prompts().mismatched == batch.mismatched


def test_a_prompt_s_only_response_is_run_even_where_no_one_needs_it() -> None:
    """Its row has the prompt's hidden state."""
    batch = Collator(("en", "sw", "zh"), 0, with_rejected=False).training(UNPAIRED, [0, 1], NORMALIZERS)
    assert places(batch.responses) == {(0, 0, CHOSEN), (1, 0, REJECTED)}


def test_prediction_has_prompts_alone() -> None:
    batch = Collator(("en", "sw", "zh"), 0, with_rejected=True).prediction(EXAMPLES, [0, 1], NORMALIZERS)
    assert batch.responses == ()
    assert len(places(batch.prompts)) == 5


@pytest.mark.parametrize("name", ["responses", "prompts", "mismatched"])
def test_moving_a_batch_moves_every_tensor(name: str) -> None:
    batch = Collator(("en", "sw", "zh"), 0, True).training(UNPAIRED, [0, 1], NORMALIZERS).to("meta")
    assert batch.keys.device.type == "meta"
    assert len(getattr(batch, name)) > 0
    for rows in getattr(batch, name):
        tensors = [value for value in vars(rows).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 7
        assert all(tensor.device.type == "meta" for tensor in tensors)
