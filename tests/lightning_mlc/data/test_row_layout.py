"""Blocks: nothing is lost, little is wasted, and none is longer than allowed."""

from __future__ import annotations

import pytest
import torch

from lightning_mlc.data.row_layout import Layout, pad_in_chunks
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenRows, TokenSequence

LAYOUTS = {
    "padded": Layout(),
    "packed": Layout(packed=True),
    "packed in one block": Layout(packed=True, few_passes=True),
    "one row": Layout(packed=True, one_row=True),
    "repeated prompts": Layout(packed=True, share_prompts=False, one_row=True),
}


def pairs(count: int) -> list[TokenSequence]:
    """Pairs in two languages, of many lengths, in mixed order."""
    random = torch.Generator().manual_seed(3)
    draw = torch.randint(1, 30, (count, 3), generator=random).tolist()
    rows = []
    for example, (prompt, chosen, rejected) in enumerate(draw):
        for language in range(2):
            tokens = [100 * language + example] * (prompt + 5 * language)
            rows.append(TokenSequence(tokens, [1] * chosen, example, language, CHOSEN))
            rows.append(TokenSequence(tokens, [2] * rejected, example, language, REJECTED, leads=False))
    order = torch.randperm(len(rows), generator=random).tolist()
    return [rows[i] for i in order]


def sequences(blocks: tuple[TokenRows, ...]) -> list[tuple[int, ...]]:
    """The labels and contents of each sequence: example, language, kind, last token of the prompt, response."""
    found = []
    for block in blocks:
        ids = block.input_ids.flatten()
        start = 0
        for index in range(len(block)):
            end = start + int(block.response_tokens[index])
            response = ids[block.response[start:end]].tolist()
            place = (block.example[index], block.language[index], block.kind[index], ids[block.prompt_end[index]])
            found.append((*map(int, place), *response))
            start = end
    return sorted(found)


@pytest.mark.parametrize("max_tokens", [None, 150])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_sequence_is_lost_or_changed(layout: Layout, max_tokens: int | None) -> None:
    rows = pairs(11)
    blocks = layout.blocks(rows, pad_id=0, max_tokens=max_tokens)
    expected = sorted((row.example, row.language, row.kind, row.prompt[-1], *row.response) for row in rows)
    assert sequences(blocks) == expected
    assert sum(int(block.leads.sum()) for block in blocks) == 22
    if max_tokens is not None:
        assert max(block.input_ids.numel() for block in blocks) <= max_tokens
    assert layout.blocks([], 0) == ()


def test_shared_prompts_and_packing_save_tokens() -> None:
    rows = pairs(11)
    prompts = sum(len(row.prompt) for row in rows if row.kind == CHOSEN)
    alone = sum(map(len, rows))
    computed = {
        name: sum(block.input_ids.numel() for block in layout.blocks(rows, 0)) for name, layout in LAYOUTS.items()
    }
    assert computed["one row"] == alone - prompts
    assert computed["repeated prompts"] == alone
    assert computed["packed"] <= 1.15 * computed["one row"]
    assert computed["packed"] < alone < computed["padded"]


def test_a_block_holds_one_piece_even_if_that_is_too_much() -> None:
    rows = [TokenSequence([1] * n, [], i, 0, NO_RESPONSE) for i, n in enumerate([3, 50, 4])]
    for layout in LAYOUTS.values():
        blocks = layout.blocks(rows, 0, max_tokens=20)
        assert sum(map(len, blocks)) == 3


def test_padded_blocks_waste_little() -> None:
    lengths = [3, 50, 4, 52, 51, 5, 200, 4]
    rows = [TokenSequence([1] * n, [], i, 0, NO_RESPONSE) for i, n in enumerate(lengths)]
    blocks = pad_in_chunks(rows, 0)
    assert sorted(e for block in blocks for e in block.example.tolist()) == list(range(8))
    for block in blocks:
        assert block.attention_mask.float().mean() >= 0.75
    assert len(blocks) == 3


def test_packed_blocks_waste_little() -> None:
    lengths = [100, 60, 39, 55, 44, 30]
    rows = [TokenSequence([1] * n, [], i, 0, NO_RESPONSE) for i, n in enumerate(lengths)]
    blocks = Layout(packed=True).blocks(rows, 0)
    # Three full rows, and one of 30 tokens that the others would have padded to 100.
    assert [tuple(block.input_ids.shape) for block in blocks] == [(1, 30), (3, 100)]
    for block in blocks:
        assert block.attention_mask.float().mean() >= 0.95
    (block,) = Layout(packed=True, few_passes=True).blocks(rows, 0)
    assert block.input_ids.shape == (4, 100)
