"""What a batch of each stage holds."""

from __future__ import annotations

import pytest
import torch

from lightning_mlc.data.batches import Normalizers
from lightning_mlc.data.collation import Collator
from lightning_mlc.data.layout import Layout
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenRows

NORMALIZERS = Normalizers(1, 1, 1)


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


LAYOUTS = pytest.mark.parametrize("layout", [Layout(), Layout(packed=True)], ids=["padded", "packed"])


@LAYOUTS
def test_training_runs_the_pair_in_the_source_language_only(layout: Layout) -> None:
    batch = Collator(("en", "sw", "zh"), 0, True, layout).training(EXAMPLES, [4, 6], NORMALIZERS)
    assert batch.ids == ("a", "b")
    assert batch.keys.tolist() == [4, 6]
    assert places(batch.responses) == {(0, 0, CHOSEN), (0, 0, REJECTED), (1, 0, CHOSEN), (1, 0, REJECTED)}
    assert places(batch.prompts) == {(0, 2, NO_RESPONSE), (1, 1, NO_RESPONSE), (1, 2, NO_RESPONSE)}
    assert batch.without_prompts().prompts == ()


@LAYOUTS
def test_evaluation_asks_in_every_language(layout: Layout) -> None:
    batch = Collator(("en", "sw", "zh"), 0, True, layout).evaluation(EXAMPLES, [0, 1], NORMALIZERS)
    cells = {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)}
    assert places(batch.responses) == {(*cell, kind) for cell in cells for kind in (CHOSEN, REJECTED)}
    assert batch.prompts == ()


def test_rejected_rows_are_left_out_where_no_one_needs_them() -> None:
    collator = Collator(("en", "sw", "zh"), 0, False, Layout())
    for batch in (collator.training(EXAMPLES, [0, 1], NORMALIZERS), collator.evaluation(EXAMPLES, [0, 1], NORMALIZERS)):
        assert all((block.kind != REJECTED).all() for block in batch.responses)


@LAYOUTS
def test_prediction_has_padded_prompts_alone(layout: Layout) -> None:
    batch = Collator(("en", "sw", "zh"), 0, True, layout).prediction(EXAMPLES, [0, 1], NORMALIZERS)
    assert batch.responses == ()
    assert all(block.packing is None for block in batch.prompts)
    assert len(places(batch.prompts)) == 5


@pytest.mark.parametrize("name", ["responses", "prompts"])
@LAYOUTS
def test_moving_a_batch_moves_every_tensor(name: str, layout: Layout) -> None:
    batch = Collator(("en", "sw", "zh"), 0, True, layout).training(EXAMPLES, [0, 1], NORMALIZERS).to("meta")
    assert batch.keys.device.type == "meta"
    for rows in getattr(batch, name):
        holders = [rows] if rows.packing is None else [rows, rows.packing]
        tensors = [value for holder in holders for value in vars(holder).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (12 if rows.packing is None else 15)
        assert all(tensor.device.type == "meta" for tensor in tensors)
