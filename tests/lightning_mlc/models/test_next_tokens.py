"""Logits at the first positions of a response: those of the plain model, for any layout of the rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_mlc.data.batches import Batch, Normalizers
from lightning_mlc.data.collation import Collator
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.data.rows import BEGINNING, NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.models.forward import Grid, run_batch
from lightning_mlc.models.policy import Policy, Shortcuts

EXAMPLES: list[dict[str, Any]] = [
    {"id": "pair", "chosen": [7, 8, 3, 5], "rejected": [9], "translated": [1]},
    {"id": "good", "chosen": [6], "rejected": [], "translated": [1]},
    {"id": "bad", "chosen": [], "rejected": [5, 5], "translated": []},
    {"id": "lonely", "chosen": [9, 9, 9], "rejected": [4], "translated": []},
]
for number, example in enumerate(EXAMPLES):
    example["languages"], example["prompts"] = [0, 1, 2], [[10 + number, 20, 30], [40 + number, 50], [60 + number] * 5]
    own = len(example["translated"])
    example |= {"ordinary": False, "translated_chosen": [[11, 12, 13]] * own, "translated_rejected": [[14]] * own}
del EXAMPLES[1]["languages"][1], EXAMPLES[1]["prompts"][1]  # in the source language and the third one
EXAMPLES[1] |= {"translated": [], "translated_chosen": [], "translated_rejected": []}
EXAMPLES[3] |= {"languages": [0], "prompts": EXAMPLES[3]["prompts"][:1]}
LENGTHS = [4, 1, 2, 3]
"""Tokens of the responses that are compared: the chosen ones, or the only ones."""
NORMALIZERS = Normalizers(4, 4, 4, 2, 2)
SHORTCUTS = [Shortcuts(), Shortcuts(True, True, True)]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager"))


def batch_of(stage: str, packed: bool, plan: RowPlan) -> Batch:
    collator = Collator(("en", "sw", "zh"), 0, plan, Layout(packed=packed))
    batch: Batch = getattr(collator, stage)(EXAMPLES, list(range(4)), NORMALIZERS)
    return batch


def expected_logits(policy: Policy, example: dict[str, Any], language: int, positions: int) -> Tensor:
    """(K, V): each by a pass of its own over the prompt and the response's tokens before it."""
    prompt = example["prompts"][example["languages"].index(language)]
    response = example["chosen"] or example["rejected"]
    return torch.stack(
        [policy.model(torch.tensor([[*prompt, *response[:place]]])).logits[0, -1] for place in range(positions)]
    )


def assert_in_place(policy: Policy, grid: Grid, positions: int) -> None:
    found = grid.next_tokens
    assert found is not None
    assert found.shape == (4, 3, positions)
    expected_positions = 0
    for index, example in enumerate(EXAMPLES):
        for language in range(3):
            rows = found.table[index, language]
            here = min(LENGTHS[index], positions) if language in example["languages"] else 0
            expected_positions += here
            assert (rows >= 0).tolist() == [place < here for place in range(positions)]
            if here:
                # the order of float32 sums differs
                expected = expected_logits(policy, example, language, here)
                torch.testing.assert_close(found.logits[rows[:here]], expected, rtol=1e-4, atol=2e-5)
    assert len(found.logits) == expected_positions  # the head ran for no other


@pytest.mark.parametrize("shortcuts", SHORTCUTS, ids=["plain", "fast"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("positions", [1, 3, 9])
@pytest.mark.parametrize(
    ("stage", "responses_in"),
    [("training", "none"), ("training", "source"), ("training", "all"), ("evaluation", "source")],
)
@torch.no_grad()
def test_every_position_is_in_its_place(
    policy: Policy, stage: str, responses_in: Any, positions: int, packed: bool, shortcuts: Shortcuts
) -> None:
    policy.shortcuts = shortcuts
    batch = batch_of(stage, packed, RowPlan(responses_in=responses_in, positions=positions))
    grid = run_batch(policy, batch, 1, positions=positions)
    assert_in_place(policy, grid, positions)
    # Nothing else changes with the rows that were added.
    plain = run_batch(policy, batch_of(stage, packed, RowPlan(responses_in=responses_in)), 1)
    torch.testing.assert_close(grid.logps, plain.logps, rtol=1e-4, atol=2e-5)
    assert grid.states is not None
    assert plain.states is not None
    torch.testing.assert_close(grid.states, plain.states, rtol=1e-4, atol=2e-5)
    assert torch.equal(grid.tokens, plain.tokens)
    assert torch.equal(grid.present, plain.present)
    assert plain.next_tokens is None
    # The rows may have more positions than are asked for.
    assert_in_place(policy, run_batch(policy, batch, positions=1), 1)


def test_the_gradient_is_that_of_the_plain_model(policy: Policy) -> None:
    policy.shortcuts = SHORTCUTS[1]
    weight = policy.model.get_parameter(WEIGHT)
    alone = [
        expected_logits(policy, e, la, min(n, 3))
        for e, n in zip(EXAMPLES, LENGTHS, strict=True)
        for la in e["languages"]
    ]
    (expected,) = torch.autograd.grad(torch.cat(alone).square().sum(), weight)
    for packed in (False, True):
        found = run_batch(policy, batch_of("training", packed, RowPlan(positions=3)), positions=3).next_tokens
        assert found is not None
        (gradient,) = torch.autograd.grad(found.logits.square().sum(), weight)
        # the order of float32 sums differs
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_one_position_runs_no_token_of_a_response_after_a_translation() -> None:
    for positions, tokens in ((0, 0), (1, 0), (3, 2 + 2 + 0 + 1 + 1)):
        batch = batch_of("training", True, RowPlan(positions=positions))
        prompts = sum(len(prompt) for example in EXAMPLES for prompt in example["prompts"][1:])
        assert sum(rows.num_tokens for rows in batch.prompts) == prompts + tokens
        assert not any(rows.longest_response for rows in batch.prompts)


def test_a_pass_that_belongs_to_no_example_adds_nothing(policy: Policy) -> None:
    """Several processes run such passes to keep in step."""
    policy.shortcuts = SHORTCUTS[1]
    batch = batch_of("training", False, RowPlan(positions=3))
    idle = [
        TokenRows.pad([TokenSequence((0,), response, 0, 0, NO_RESPONSE, leads=False, positions=1)], 0)
        for response in ((), (0,))
    ]
    filled = dataclasses.replace(batch, prompts=(*batch.prompts, idle[0]), responses=(*batch.responses, idle[1]))
    grids = [run_batch(policy, rows, positions=3) for rows in (batch, filled)]
    tables = [grid.next_tokens for grid in grids]
    assert tables[0] is not None
    assert tables[1] is not None
    assert len(tables[1].logits) == len(tables[0].logits) + 2
    assert torch.equal(*(table.logits[table.table.clamp(min=0)] for table in tables if table is not None))
    assert torch.equal(tables[0].table >= 0, tables[1].table >= 0)


def test_positions_come_one_after_the_other() -> None:
    rows = TokenRows.pad(
        [
            TokenSequence((1, 2), (3, 4), 0, 0, BEGINNING, positions=3),
            TokenSequence((5,), (), 0, 1, NO_RESPONSE, positions=1),
            TokenSequence((6, 7, 8), (9,), 1, 1, BEGINNING, leads=False, positions=2),
        ],
        0,
    )
    assert rows.first.tolist() == [1, 4, 8 + 2, 2, 8 + 3, 3]
    assert rows.first_sequence.tolist() == [0, 1, 2, 0, 2, 0]
    assert rows.first_position.tolist() == [0, 0, 0, 1, 1, 2]
    assert rows.first_counts == (3, 2, 1)
    assert [rows.num_first(positions) for positions in range(5)] == [0, 3, 5, 6, 6]
    assert (rows.longest_response, rows.response.tolist(), rows.response_tokens.tolist()) == (0, [], [0, 0, 0])
