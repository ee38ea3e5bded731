"""Chunked log-probabilities and their gradients, against the log-softmax of all logits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, save_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
)

from lightning_mlc.data.rows import CHOSEN, TokenRows, TokenSequence
from lightning_mlc.models.loading import enable_checkpointing
from lightning_mlc.models.logprobs import logps_of, token_logps
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.parts import find_decoder
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import self_check

SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = {
    "phi: a bias": PhiConfig(**SIZES),
    "cohere: times logit_scale": CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.25),
    "granite: divided by logits_scaling": GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=4.0),
    "mixtral: experts": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, output_router_logits=True),
    "phi3: fused projections": Phi3Config(**SIZES, num_key_value_heads=2),
    "mamba: no attention": MambaConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    ),
}
"""Architectures with extra operations between hidden states and logits, or around them."""

IDS = torch.arange(7, 27)[None]


def load(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    if kind in HEADS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(HEADS[kind])
    else:
        # A cap at 30 would hardly change logits between -1 and 1.
        changes = {"final_logit_softcapping": 0.5} if kind == "gemma2" else {}
        model = AutoModelForCausalLM.from_pretrained(save_model(folder / kind, kind, **changes))
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    return model.to(dtype).eval()


def whole_logps(model: Any) -> Tensor:
    """Computed by torch from all logits."""
    logits = model(input_ids=IDS, use_cache=False).logits[0, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(1).gather(1, IDS[0, 1:, None]).squeeze(1)


def chunked_logps(model: Any, chunk_tokens: int) -> Tensor:
    hidden = model.base_model(input_ids=IDS, use_cache=False)[0][0, :-1]
    return token_logps(
        model, find_decoder(model), hidden, IDS[0, 1:], chunk_elements=chunk_tokens * model.config.vocab_size
    )


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)  # each token has a different weight
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, chunk_tokens: int, rtol: float) -> None:
    expected, found = whole_logps(model), chunked_logps(model, chunk_tokens)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= rtol * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("chunk_tokens", [1, 7, 18, 19, 100])
def test_every_size_of_chunk(tmp_path: Path, chunk_tokens: int) -> None:
    """19 tokens: chunks of one, chunks with a remainder, with a remainder of one, and a single chunk."""
    # float64 distinguishes an error from rounding
    assert_same(load("llama", tmp_path, torch.float64), chunk_tokens, rtol=1e-12)


@pytest.mark.parametrize("kind", [*CONFIGS, *HEADS])
def test_every_head(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load(kind, tmp_path)
    with caplog.at_level(logging.WARNING, "lightning_mlc"):
        assert self_check(Policy(model)).shortcuts.two_parts, caplog.text
    assert_same(model, 7, rtol=1e-5)  # the order of float32 sums differs


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        # Products of other shapes round differently: a few units in the last of 8 or 11 bits.
        (torch.bfloat16, 3e-2),
        (torch.float16, 4e-3),
    ],
    ids=str,
)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype, rtol: float) -> None:
    model = load("llama", tmp_path, dtype)
    assert chunked_logps(model, 7).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(model, 7, rtol)


def test_mixed_precision_sums_the_head_s_gradient_in_float32(tmp_path: Path) -> None:
    """bfloat16 logits, and a gradient of lm_head that is as close to the exact one as that of a single product."""
    model = load("qwen2", tmp_path)
    exact = gradients(model, whole_logps(model))["lm_head.weight"]
    errors = []
    for logps in (whole_logps, lambda model: chunked_logps(model, 1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = logps(model)
        errors.append(float((gradients(model, found)["lm_head.weight"] - exact).norm() / exact.norm()))
    assert errors[0] > 1e-4  # it was bfloat16
    assert errors[1] < 1.2 * errors[0]


def test_one_chunk_of_logits_at_a_time(tmp_path: Path) -> None:
    """Autograd keeps no logits between the passes, and lm_head never computes more than one chunk."""
    model = load("llama", tmp_path)
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: made.append(output.numel()))
    hidden = model.base_model(input_ids=IDS)[0][0, :-1]
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    vocabulary = model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = token_logps(model, "model", hidden, IDS[0, 1:], chunk_elements=4 * vocabulary)
    assert max(kept, default=0) < vocabulary
    assert made == [4 * vocabulary] * 4 + [3 * vocabulary]
    logps.sum().backward()
    assert sorted(made[5:]) == sorted(made[:5])  # once more in the backward pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_lm_head(tmp_path: Path, checkpointing: bool) -> None:
    model = add_lora(load("qwen2", tmp_path), LoRA(r=2, target_modules=["lm_head", "q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it starts at 0, which would hide the adapter
            nn.init.normal_(parameter)
    inner: Any = model.get_base_model()
    if checkpointing:
        enable_checkpointing(inner)
        inner.enable_input_require_grads()
        inner.train()
    assert self_check(Policy(model)).shortcuts.two_parts
    assert inner.training == checkpointing
    assert_same(inner, 7, rtol=1e-5)
    assert any("lm_head.lora_A" in name for name in gradients(inner, chunked_logps(inner, 7)))
    with model.disable_adapter():
        without = chunked_logps(inner, 7)
        torch.testing.assert_close(without, whole_logps(inner), rtol=1e-5, atol=1e-5)
    assert (without - chunked_logps(inner, 7)).abs().max() > 0.1


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    found = logps_of(logits, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(found, torch.tensor([-2e4, -0.31326169, -1.0986123]))
    found.sum().backward()
    expected = [[-1.0, 1.0, 0.0], [0.0, -0.26894142, 0.26894142], [2 / 3, -1 / 3, -1 / 3]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))


def test_gradient_in_float64() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: logps_of(x, torch.tensor([4, 0, 2])), (logits,))


def test_a_model_whose_logits_depend_on_more_than_the_hidden_states_is_found_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load("llama", tmp_path)
    original = model.forward

    def sees_the_tokens(*arguments: Any, **keywords: Any) -> Any:
        output = original(*arguments, **keywords)
        if keywords.get("input_ids") is not None:
            output.logits = output.logits * 1.001
        return output

    model.forward = sees_the_tokens
    assert not self_check(Policy(model)).shortcuts.two_parts
    assert "LlamaForCausalLM is run the plain way (logits differ" in caplog.text


def test_a_decoder_inside_another_module_is_found() -> None:
    """OPT applies further layers after its base model."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=261, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    ids = IDS[0].tolist()
    policy = Policy(model)
    assert self_check(policy, 2).shortcuts.two_parts
    with torch.no_grad():
        found = policy(TokenRows.pad([TokenSequence(ids[:1], ids[1:], 0, 0, CHOSEN)], 0))
        torch.testing.assert_close(found.logps[0], whole_logps(model).sum())
