"""The formula against torch's counter, which adds up the operations that are really called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CONFIGS, SIZES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma4TextConfig,
    Mamba2Config,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    RwkvConfig,
)

from lightning_mlc.data.rows import CHOSEN, TokenRows, TokenSequence
from lightning_mlc.models.flops import ModelFlops, Pass
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import self_check

VOCABULARY = 300
MORE: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "num_key_value_heads": 2}
MODELS: dict[str, PreTrainedConfig] = {
    **{kind: config(VOCABULARY) for kind, config in CONFIGS.items()},
    "wide heads": Qwen3Config(**MORE, head_dim=16),
    "experts": MixtralConfig(**MORE, num_local_experts=4, num_experts_per_tok=2),
    "shared expert": Qwen2MoeConfig(
        **MORE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}


def build(config: PreTrainedConfig) -> Any:
    """A model with operations that the counter knows. It misses fused attention on CPUs, and experts in one product."""
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def counted(policy: Policy, rows: TokenRows) -> tuple[int, int]:
    """Operations of a forward pass, and of its backward pass."""
    self_check(policy)
    with FlopCounterMode(display=False) as forward:
        loss: Tensor = policy(rows).logps.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    return total(forward), total(backward)


def formula(model: Any) -> ModelFlops:
    found = ModelFlops.of(model)
    assert found is not None
    return found


def total(counter: FlopCounterMode) -> int:
    """All counted operations except the angles of the positions: up to transformers 5.17 they are a product, later
    not."""
    angles = sum(sum(ops.values()) for name, ops in counter.flop_counts.items() if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - angles


def sequences(*lengths: tuple[int, int]) -> TokenRows:
    rows = [TokenSequence(list(range(n)), list(range(m)), i, 0, CHOSEN) for i, (n, m) in enumerate(lengths)]
    return TokenRows.pad(rows, 0)


@pytest.mark.parametrize("kind", MODELS)
def test_sequences_of_one_length_exactly(kind: str) -> None:
    model = build(MODELS[kind])
    forward, backward = counted(Policy(model), sequences((20, 8), (25, 3)))
    flops, size = formula(model), Pass(tokens=56, length=28, head_tokens=11)
    assert flops.forward(size) == forward
    assert flops.backward(size) == backward


def test_ragged_sequences_nearly() -> None:
    """Each sequence is counted alone, because the counter takes padding for tokens. The formula gives slightly less,
    because the square of the mean length is less than the mean of the squared lengths."""
    lengths = [(10, 5), (12, 12), (40, 3), (21, 9)]
    model = build(MODELS["llama"])
    parts = [counted(Policy(model), sequences(length)) for length in lengths]
    flops, size = formula(model), Pass(tokens=112, length=112 / 4, head_tokens=29)
    for found, expected in zip(
        (flops.forward(size), flops.backward(size)), map(sum, zip(*parts, strict=True)), strict=True
    ):
        assert 0.97 * expected < found < expected


def test_layers_that_are_not_run_cost_nothing() -> None:
    """The same as in a model without these layers."""
    whole, short = (build(CONFIGS["llama"](VOCABULARY)) for _ in range(2))
    short.model.layers = short.model.layers[:2]
    rows = sequences((20, 0), (20, 0))
    with FlopCounterMode(display=False) as forward:
        states = short.model(rows.input_ids)[0]
    with FlopCounterMode(display=False) as backward:
        states.sum().backward()
    flops, size = formula(whole), Pass(tokens=40, length=20, layers=2)
    assert flops.forward(size) == total(forward)
    assert flops.backward(size) == total(backward)


def test_frozen_weights_need_no_gradient() -> None:
    """The formula gives slightly more, because the first layer's input needs no gradient either."""
    model = build(CONFIGS["llama"](VOCABULARY))
    policy = Policy(add_lora(model, LoRA(r=2)))
    forward, backward = counted(policy, sequences((20, 8), (25, 3)))
    flops, size = formula(policy.causal_lm), Pass(tokens=56, length=28, head_tokens=11)
    assert flops.forward(size) == forward
    assert backward < flops.backward(size) < 1.1 * backward
    assert flops.trained_weights < 0.2 * flops.weights


OTHERS: dict[str, Any] = {
    "heads that differ by layer": lambda: Gemma4TextConfig(
        **MORE,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
    ),
    "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": lambda: Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=8, n_groups=1
    ),
    "rwkv": lambda: RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "a hybrid": lambda: BambaConfig(
        **MORE, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_where_the_formula_does_not_hold_there_is_no_figure(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OTHERS[kind]())
    assert ModelFlops.of(model) is None
