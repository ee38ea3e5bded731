"""A converted model equals the model that transformers would have loaded in that dtype."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families.architectures import FAMILIES
from families.trial import make_model
from transformers import AutoModelForCausalLM

from lightning_mlc.models.policy import Policy
from lightning_mlc.models.tensors import precision_kept


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("llama", torch.float64),
        ("deepseek_v3", torch.bfloat16),
        ("gpt_oss", torch.float16),
        ("rwkv", torch.float16),
    ],
)
def test_converting_gives_what_loading_gives(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rotary frequencies stay in float32, and so do routers if a family keeps them in float32 next to half
    precision."""
    folder = make_model(next(family for family in FAMILIES if family.model_type == kind), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    policy = Policy(copy.deepcopy(loaded)).to(dtype)
    with precision_kept(loaded):
        loaded.to(dtype)
    kinds = {tensor.dtype for tensor in (*expected.parameters(), *expected.buffers())}
    assert kinds == {dtype, torch.float32}
    for found in (loaded, policy.causal_lm):
        for wanted, tensors in (
            (dict(expected.named_parameters()), dict(found.named_parameters())),
            (dict(expected.named_buffers()), dict(found.named_buffers())),
        ):
            assert {key: value.dtype for key, value in tensors.items()} == {
                key: value.dtype for key, value in wanted.items()
            }
            assert [key for key, value in tensors.items() if not torch.equal(value, wanted[key])] == []
