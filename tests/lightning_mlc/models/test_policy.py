"""One pass over padded rows, against the model run on each row alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import CONFIGS, save_model
from transformers import AutoModelForCausalLM

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenRows, TokenSequence
from lightning_mlc.errors import UserError
from lightning_mlc.models.layers import resolve_layer
from lightning_mlc.models.loading import enable_checkpointing
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import self_check

ROWS = [
    TokenSequence([1, 2, 3], [4, 5], 0, 0, CHOSEN),
    TokenSequence([1, 2, 3, 7, 8, 9, 11, 12, 13, 14, 15], [4], 0, 1, REJECTED),
    TokenSequence([9, 8], [7, 7, 7, 7], 1, 0, CHOSEN),
    TokenSequence([5, 6, 7], [], 1, 1, NO_RESPONSE),
]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_padded_rows_equal_rows_alone(tmp_path: Path, kind: str, side: Literal["left", "right"]) -> None:
    model = load(save_model(tmp_path / kind, kind))
    policy = Policy(model)
    for layer in range(4):
        self_check(policy, layer)
        with torch.no_grad():
            found = policy(TokenRows.pad(ROWS, pad_id=0, side=side), layer, pool=True)
        for index, row in enumerate(ROWS):
            with torch.no_grad():
                alone = model(torch.tensor([[*row.prompt, *row.response]]), output_hidden_states=True)
            log_probabilities = alone.logits[0].double().log_softmax(-1)
            start = len(row.prompt) - 1
            expected = sum(float(log_probabilities[start + i, token]) for i, token in enumerate(row.response))
            # the order of float32 sums differs, over at most four tokens
            assert float(found.logps[index]) == pytest.approx(expected, abs=2e-5)
            assert found.tokens[index] == len(row.response)
            torch.testing.assert_close(found.states[index], alone.hidden_states[layer][0, start], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(found.pooled[index], alone.hidden_states[-1][0].mean(0), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_means_over_sequences_that_share_rows_and_prompts(tiny_model: Path, share_prompts: bool) -> None:
    model = load(tiny_model)
    rows = [*ROWS[:3], TokenSequence([1, 2, 3], [6, 7, 8, 9], 0, 0, REJECTED, leads=False)]
    (packed,) = Layout(packed=True, share_prompts=share_prompts, one_row=True).blocks(rows, pad_id=0)
    with torch.no_grad():
        found = Policy(model)(packed, pool=True).pooled
        for index in range(len(rows)):
            place = int(packed.example[index]), int(packed.language[index]), int(packed.kind[index])
            (row,) = (row for row in rows if (row.example, row.language, row.kind) == place)
            alone = model(torch.tensor([[*row.prompt, *row.response]]), output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(found[index], alone[0].mean(0), rtol=1e-4, atol=2e-5)
        assert Policy(model)(packed).pooled is None


def test_logits_are_made_for_response_tokens_only(tiny_model: Path) -> None:
    model = load(tiny_model)
    policy = Policy(model)
    self_check(policy, 3)
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: calls.append(inputs[0].shape[1]))
    policy(TokenRows.pad(ROWS[3:], 0), 3)
    assert calls == []
    policy(TokenRows.pad(ROWS, 0), 3)
    assert calls == [2 + 1 + 4]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_that_does_not_come_apart_makes_its_own_logits(
    tiny_model: Path, side: Literal["left", "right"]
) -> None:
    rows = TokenRows.pad(ROWS, 0, side=side)
    policy = Policy(load(tiny_model))
    whole = policy(rows, 2, pool=True)
    assert all(self_check(policy, 2).shortcuts)
    apart = policy(rows, 2, pool=True)
    for found, expected in zip(whole, apart, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path, layer: int) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(tiny_model).train()
        policy = Policy(model)
        self_check(policy, layer)
        forwards: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        if checkpointing:
            with warnings.catch_warnings(action="error"):  # transformers renamed its method, and warns
                enable_checkpointing(model)
        out = policy(TokenRows.pad(ROWS, 0), layer)
        (out.logps.sum() + out.states.square().sum()).backward()
        assert len(forwards) == (2 if checkpointing else 1)
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("layer", "expected"), [(-1, 30), (0, 0), (30, 30), (-31, 0), (7, 7), (0.5, 15), (1.0, 30), (0.0, 0)]
)
def test_layers_by_index_and_by_fraction(layer: int | float, expected: int) -> None:
    assert resolve_layer(layer, 30) == expected


@pytest.mark.parametrize("layer", [31, -32, 1.5, -0.1])
def test_a_layer_the_model_does_not_have(layer: int | float) -> None:
    with pytest.raises(UserError, match=r"model\.consistency\.layer"):
        resolve_layer(layer, 30)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_half_precision_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    """Lightning would convert a module as a whole. Rounded rotary frequencies give wrong positions far into a row."""
    folder = save_model(tmp_path / kind, kind)
    loaded, converted = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    policy = Policy(converted)
    torch.nn.ModuleList([policy]).to(torch.bfloat16).to("cpu")
    ids = torch.arange(300)[None] % 200
    with torch.no_grad():
        assert torch.equal(policy.causal_lm(ids).logits, loaded(ids).logits)
