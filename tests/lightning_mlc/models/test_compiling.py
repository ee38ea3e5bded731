"""Compiled layers against the same layers without compilation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from conftest import save_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenSequence
from lightning_mlc.errors import UserError
from lightning_mlc.models.compiling import require_compiler
from lightning_mlc.models.loading import enable_checkpointing
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.policy import Policy, Shortcuts

ROWS = [
    TokenSequence((1, 2, 3), (4, 5), 0, 0, CHOSEN),
    TokenSequence((1, 2, 3), (6,), 0, 0, REJECTED, leads=False),
    TokenSequence((1, 2, 3, 7, 8, 9, 11, 12, 13, 14, 15), (4,), 0, 1, REJECTED),
    TokenSequence((5, 6, 7), (), 1, 1, NO_RESPONSE),
]
LAYOUTS = [Layout(), Layout(packed=True)]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()
    counters.clear()


def gradient(policy: Policy, layer: int, layout: Layout) -> torch.Tensor:
    """Log-probabilities, hidden states, and all gradients of a loss on them, as one vector."""
    policy.zero_grad()
    found = []
    for rows in layout.blocks(ROWS, 0):
        out = policy(rows, layer)
        assert out.states is not None
        (out.logps.sum() + out.states.float().square().sum()).backward()
        found += [out.logps.detach(), out.states.detach().float().flatten()]
    return torch.cat([*found, *(p.grad.flatten() for p in policy.parameters() if p.grad is not None)])


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
def test_compiled_layers_give_the_same_results_and_gradients(tmp_path: Path) -> None:
    # Two kinds of layers, with and without a sliding window, and capped scores.
    model = load(save_model(tmp_path / "model", "gemma2"))
    policy, plain = Policy(copy.deepcopy(model)), Policy(model)
    policy.shortcuts = plain.shortcuts = Shortcuts(True, True, True)
    names = list(policy.state_dict())
    policy.compile_layers()
    assert list(policy.state_dict()) == names
    # Hidden states of different layers, so that hooks come and go between calls of layers that are already compiled.
    for layer, layout in ((1, LAYOUTS[0]), (3, LAYOUTS[1]), (2, LAYOUTS[0]), (1, LAYOUTS[1])):
        # The order of float32 sums differs, and depends on the processor: with AVX-512 of an AMD EPYC, plain gradients
        # are 5e-6 from those in float64, compiled ones 1.1e-5.
        assert difference(gradient(policy, layer, layout), gradient(plain, layer, layout)) < 3e-5
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_with_adapters_checkpointing_and_mixed_precision(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", num_hidden_layers=2)
    results = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model: Any = add_lora(load(folder), LoRA(r=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, so that the loss would not depend on the other adapters
                torch.nn.init.normal_(parameter, std=0.1)
        enable_checkpointing(model)
        model.enable_input_require_grads()
        policy = Policy(model)
        policy.shortcuts = Shortcuts(True, True, True)
        if compiled:
            policy.compile_layers()
        with torch.autocast("cpu", torch.bfloat16):
            results[compiled] = gradient(policy, 1, LAYOUTS[1])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 1
    # Within a compiled kernel, nothing is rounded to bfloat16 (2**-9). The differences add up over the layers.
    assert 0 < difference(results[True], results[False]) < 2e-2


def test_a_copy_is_compiled_and_has_its_own_weights(tiny_model: Path) -> None:
    policy = Policy(load(tiny_model))
    policy.compile_layers()
    other = copy.deepcopy(policy)
    layers = [p.causal_lm.base_model.layers for p in (policy, other)]
    assert all(layer._compiled_call_impl is not None for stack in layers for layer in stack)
    with torch.no_grad():
        layers[1][0].mlp.up_proj.weight.zero_()
    states = torch.ones(1, 4, 32)
    rotation = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    torch.compiler.set_stance("force_eager")
    try:
        found = [stack[0](states, position_embeddings=rotation) for stack in layers]
    finally:
        torch.compiler.set_stance("default")
    assert not torch.equal(*found)


@pytest.mark.slow
def test_without_a_compiler() -> None:
    without = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True})
    with (
        without,
        pytest.raises(UserError, match=r"^model\.compile: torch\.compile does not work on this machine \(.+\); inst"),
    ):
        require_compiler(torch.device("cpu"))
    require_compiler(torch.device("cpu"))
