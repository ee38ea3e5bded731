"""The positions of a batch's results, for any combination of responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_mlc.data.batches import Normalizers
from lightning_mlc.data.collation import Collator
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.data.rows import CHOSEN, MISMATCHED, REJECTED
from lightning_mlc.models.forward import run_batch
from lightning_mlc.models.policy import Policy

EXAMPLES: list[dict[str, Any]] = [
    {"id": "pair", "chosen": [7, 8], "rejected": [9], "mismatched": [4, 4, 4]},
    {"id": "good", "chosen": [6], "rejected": [], "mismatched": [9]},
    {"id": "bad", "chosen": [], "rejected": [5, 5], "mismatched": [7, 8]},
]
for number, example in enumerate(EXAMPLES):
    example["languages"], example["prompts"] = [0, 1], [[10 + number, 20, 30], [40 + number, 50]]
    example |= {"ordinary": False, "translated": [], "translated_chosen": [], "translated_rejected": []}
OTHERS = [example["mismatched"] for example in EXAMPLES]
COLLATORS = [Collator(("en", "sw"), 0, RowPlan(True), layout) for layout in (Layout(), Layout(packed=True))]
BOTH = pytest.mark.parametrize("collator", COLLATORS, ids=["padded", "packed"])
NORMALIZERS = Normalizers(3, 3, 3, 2, 2)
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager"))


def logp(policy: Policy, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(response))


def state(policy: Policy, prompt: list[int]) -> torch.Tensor:
    found: torch.Tensor = policy.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0, -1]
    return found


@pytest.mark.parametrize("stage", ["training", "evaluation"])
@BOTH
def test_every_result_is_in_its_place(policy: Policy, collator: Collator, stage: str) -> None:
    grid = run_batch(policy, getattr(collator, stage)(EXAMPLES, [0, 1, 2], NORMALIZERS, OTHERS), 2)
    assert grid.present.all()
    assert grid.states is not None
    for index, example in enumerate(EXAMPLES):
        for language, prompt in enumerate(example["prompts"]):
            for kind, name in ((CHOSEN, "chosen"), (REJECTED, "rejected"), (MISMATCHED, "mismatched")):
                is_run = language == 0 or (stage == "evaluation" and kind != MISMATCHED)
                response = example[name] if is_run else []
                assert grid.tokens[index, language, kind] == len(response)
                # the order of float32 sums differs
                expected = pytest.approx(logp(policy, prompt, response), abs=2e-5)
                assert grid.logps[index, language, kind].item() == expected
            expected_state = state(policy, prompt).detach()
            torch.testing.assert_close(grid.states[index, language], expected_state, rtol=1e-4, atol=2e-5)


@BOTH
def test_a_prompt_s_state_has_one_gradient_whatever_its_responses(policy: Policy, collator: Collator) -> None:
    """A pair has its prompt twice in the batch, so a gradient through both would count double."""
    states = run_batch(policy, collator.training(EXAMPLES, [0, 1, 2], NORMALIZERS, OTHERS), 2).states
    assert states is not None
    alone = torch.stack([state(policy, prompt) for example in EXAMPLES for prompt in example["prompts"]])
    weight = policy.model.get_parameter(WEIGHT)
    (found,) = torch.autograd.grad(states.square().sum(), weight)
    (expected,) = torch.autograd.grad(alone.square().sum(), weight)
    # the order of float32 sums differs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_objective_gets_what_it_needs_and_mismatched_scores_carry_no_gradient(policy: Policy) -> None:
    grid = run_batch(policy, COLLATORS[0].training(EXAMPLES, [0, 1, 2], NORMALIZERS, OTHERS))
    found = grid.responses(grid, 0, True, True)
    assert found.mismatched is not None
    assert found.counts.tolist() == [2, 1, 1]
    assert found.chosen.present.tolist() == [True, True, False]
    weight = policy.model.get_parameter(WEIGHT)
    (none,) = torch.autograd.grad(found.mismatched.logps.sum(), weight, retain_graph=True)
    assert not none.any()
    (some,) = torch.autograd.grad(found.chosen.logps.sum(), weight)
    assert some.any()
    assert grid.responses(grid, 0, True, False).mismatched is None
    assert grid.responses(None, 0, False, False).rejected is None
