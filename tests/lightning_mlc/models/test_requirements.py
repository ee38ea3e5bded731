"""If a model's configuration shows that a run is impossible, this is reported before the weights are read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    Gemma3Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Zamba2Config,
)

from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.parts import beyond_text
from lightning_mlc.models.requirements import require_fitting
from lightning_mlc.sources import ModelSource

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
POSITIONS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=0
    ),
    "opt, whose table begins with two other rows": lambda: OPTConfig(
        vocab_size=128,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
    ),
    "gptj, whose angles are a table": lambda: GPTJConfig(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=40, bos_token_id=0, eos_token_id=0
    ),
    "ctrl, whose waves are a table": lambda: CTRLConfig(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=40
    ),
    "mpt, whose biases are a table": lambda: MptConfig(
        vocab_size=128, d_model=32, n_layers=2, n_heads=4, max_seq_len=40
    ),
}


def folder(path: Path, config: PreTrainedConfig) -> ModelSource:
    """A model without weights, so that none can be read."""
    config.save_pretrained(path)
    return ModelSource(str(path))


def require(path: Path, config: PreTrainedConfig, lora: LoRA | None = None, token: int = 5, length: int = 9) -> None:
    require_fitting(folder(path, config), config, lora, None, token, length)


def test_ids_that_have_no_embedding(tmp_path: Path) -> None:
    require(tmp_path, LlamaConfig(**SIZES), token=127)
    with pytest.raises(UserError, match=r"ids up to 128, but .* embeds 128 tokens \(0 to 127\)"):
        require(tmp_path, LlamaConfig(**SIZES), token=128)


@pytest.mark.parametrize("kind", POSITIONS)
def test_sequences_beyond_the_positions_that_were_learnt(tmp_path: Path, kind: str) -> None:
    """40 tokens can be run, and are; 41 cannot."""
    config = POSITIONS[kind]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 5), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 41), 5), use_cache=False)
    require(tmp_path, config, length=40)
    with pytest.raises(UserError, match=r"^data\.max_prompt_length: .* up to 41 tokens, but .* learnt 40 positions"):
        require(tmp_path, config, length=41)


def test_positions_that_are_computed_have_no_end(tmp_path: Path) -> None:
    require(tmp_path, LlamaConfig(**SIZES, max_position_embeddings=16), length=100)


def test_positions_that_depend_on_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=rope)
    with caplog.at_level(logging.WARNING, "lightning_mlc"):
        require(tmp_path, config, length=16)
        assert not caplog.records
        require(tmp_path, config, length=17)
    assert "positions of type dynamic depend on the longest sequence of a pass beyond 16 tokens" in caplog.text


SHARED: dict[str, tuple[Callable[[], PreTrainedConfig], str | list[str], str]] = {
    "tied head": (lambda: LlamaConfig(**SIZES, tie_word_embeddings=True), ["lm_head", "q_proj"], "lm_head share"),
    "tied embeddings": (lambda: LlamaConfig(**SIZES, tie_word_embeddings=True), ["embed_tokens"], "lm_head share"),
    "blocks with the weights of others": (
        lambda: Zamba2Config(
            **{**SIZES, "num_hidden_layers": 4},
            layer_types=["mamba", "hybrid", "mamba", "hybrid"],
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=8,
            num_mem_blocks=1,
        ),
        "all-linear",
        "share one weight",
    ),
}


@pytest.mark.parametrize("kind", SHARED)
def test_adapters_on_a_weight_that_is_used_twice(tmp_path: Path, kind: str) -> None:
    config, modules, text = SHARED[kind]
    with pytest.raises(UserError, match=rf"^model\.lora\.target_modules: .*{text}"):
        require(tmp_path, config(), LoRA(target_modules=modules))


def test_adapters_on_weights_of_their_own(tmp_path: Path) -> None:
    require(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=True), LoRA())
    require(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=False), LoRA(target_modules=["lm_head"]))


def test_a_router_that_is_called_linear_is_not_adapted() -> None:
    torch.manual_seed(0)
    config = PhimoeConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    model = add_lora(AutoModelForCausalLM.from_config(config), LoRA(r=2))
    adapted = {name for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert any("q_proj" in name for name in adapted)
    assert not any("router" in name or "gate" in name for name in adapted)
    loss: Any = model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()
    loss.backward()


def multimodal() -> Gemma3Config:
    """A multimodal model. An image takes four positions."""
    return Gemma3Config(
        text_config={**SIZES, "head_dim": 8},
        vision_config={**SIZES, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )


def test_places_of_images_are_no_positions_of_text(tmp_path: Path) -> None:
    require(tmp_path, multimodal(), length=100)


def test_what_text_never_reaches_is_not_adapted_and_not_trained() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(multimodal())
    assert beyond_text(model) == ["model.vision_tower", "model.multi_modal_projector"]
    model.train()(input_ids=torch.tensor([[5, 6, 7]]), token_type_ids=torch.zeros(1, 3).long()).logits.sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without
    assert all(name.startswith(tuple(beyond_text(model))) for name in without)
    adapted = {name for name, _ in add_lora(model, LoRA(r=2)).named_modules() if name.endswith(".lora_A")}
    assert adapted
    assert not any("vision_tower" in name or "projector" in name for name in adapted)


def test_experts_in_float64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=2)).save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        exact, single = (
            load_causal_lm(ModelSource(str(tmp_path)), dtype)(input_ids=ids).logits
            for dtype in (torch.float64, torch.float32)
        )
    assert exact.dtype == torch.float64
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)  # float32's rounding
