"""The families of causal language models in the tests, as tiny random models.

To add one, add a row to ``FAMILIES``: its ``model_type`` in transformers, and sizes that make it tiny. Windows and
chunks must be shorter than the training sequences, because otherwise their effects would not show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

Part = Literal["weights", "middle", "adapters"]
"""The trained parts: all weights with the states of the last layer, all weights with those of a middle layer, or LoRA.
"""
PARTS: tuple[Part, ...] = ("weights", "middle", "adapters")

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Keys that most families have. Some families keep keys that they do not use, so each row says whether these apply."""


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: The family's name, as its authors write it.
        model_type: Its name in transformers.
        sizes: Keys of its configuration, in addition to those of ``COMMON`` and the tokenizer's.
        common: Whether the keys of ``COMMON`` apply.
        quick: Whether the default round of tests includes it.
        refused: By trained part, a piece of the message with which it is refused.
        wrong: By trained part, a known fault.
        states_from: Index of the layer whose output is first in ``hidden_states``. Usually 0, the embeddings.
    """

    name: str
    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    common: bool = True
    quick: bool = False
    refused: dict[Part, str] = field(default_factory=dict)
    wrong: dict[Part, str] = field(default_factory=dict)
    states_from: int = 0

    def config(self, vocabulary: int, end: int, pad: int) -> PreTrainedConfig:
        """Return its configuration, without dropout, for ``vocabulary`` tokens."""
        tokens = {"vocab_size": vocabulary, "eos_token_id": end, "pad_token_id": pad, "bos_token_id": end}
        config: PreTrainedConfig = AutoConfig.for_model(
            self.model_type, **(COMMON if self.common else {}) | tokens | self.sizes
        )
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            for key, value in list(vars(part).items()):
                if ("drop" in key) and isinstance(value, float):
                    setattr(part, key, 0.0)
        return config


def everywhere(reason: str) -> dict[Part, str]:
    """Map every trained part to ``reason``."""
    return dict.fromkeys(PARTS, reason)


EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
"""Keys of multi-head latent attention, as in DeepSeek."""
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}
"""Keys of the gated delta rule, as in Qwen3-Next."""
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
ZAMBA2 = {
    "num_hidden_layers": 4,
    "num_mem_blocks": 1,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "adapter_rank": 4,
}
"""Its two attention layers share one block of weights, and each has its own adapters."""

FAMILIES: tuple[Family, ...] = (
    # Dense decoders with rotary positions.
    Family("Llama 2 and 3", "llama", {"tie_word_embeddings": True}, quick=True),
    Family("Mistral", "mistral", {"sliding_window": 8}),
    Family("Ministral", "ministral", {**MIXED, "head_dim": 8}),
    Family("Ministral 3", "ministral3", {"head_dim": 8}),
    Family("Qwen 2 and 2.5", "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    Family("Qwen 3", "qwen3", {"head_dim": 8}),
    Family("Gemma", "gemma", {"head_dim": 8}),
    Family("Gemma 2", "gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}, quick=True),
    Family("Gemma 3, text", "gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}),
    Family("VaultGemma", "vaultgemma", {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}),
    Family("Phi 1, 1.5 and 2", "phi"),
    Family("Phi 3 and 4", "phi3", {"sliding_window": 8}),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", MIXED),
    Family("Granite", "granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    Family("Command R", "cohere", {"logit_scale": 0.25}),
    Family("Command R7B (Cohere 2)", "cohere2", MIXED),
    Family("SmolLM 3", "smollm3", {"no_rope_layers": [1, 0]}),
    Family("StableLM", "stablelm"),
    Family("StarCoder 2", "starcoder2", {"sliding_window": 8}),
    Family("GLM-4 (9B)", "glm", {"head_dim": 8}),
    Family("GLM-4 (0414)", "glm4", {"head_dim": 8}),
    Family("EXAONE 4", "exaone4", MIXED),
    Family("Nemotron", "nemotron"),
    Family("Helium", "helium", {"head_dim": 8}),
    Family("Seed-OSS", "seed_oss", {"head_dim": 8}),
    Family("Arcee", "arcee"),
    Family("Apertus", "apertus"),
    Family("ERNIE 4.5", "ernie4_5", {"head_dim": 8}),
    Family("HunYuan, dense", "hunyuan_v1_dense", {"head_dim": 8}),
    Family("Persimmon", "persimmon"),
    Family("DiffLlama", "diffllama"),
    Family("BitNet", "bitnet"),
    Family("NanoChat", "nanochat"),
    Family("Jais 2", "jais2"),
    Family("Doge", "doge"),
    Family("HyperCLOVA X", "hyperclovax"),
    Family("MiniCPM 3", "minicpm3", LATENT),
    Family("ModernBERT decoder", "modernbert-decoder", MIXED | {"local_attention": 8}),
    # Mixtures of experts. Phi 3.5 is left out, because it draws its experts at random in training.
    Family("Mixtral", "mixtral", {"num_local_experts": 4, "sliding_window": 8}, quick=True),
    Family("Qwen 2, experts", "qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    Family("Qwen 3, experts", "qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    Family("OLMoE", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("Granite, experts", "granitemoe", {"num_local_experts": 4}),
    Family(
        "DeepSeek V2",
        "deepseek_v2",
        {**EXPERTS, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    Family(
        "DeepSeek V3 and R1",
        "deepseek_v3",
        {**EXPERTS, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    Family(
        "dots.llm1",
        "dots1",
        {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    ),
    Family("GLM 4.5", "glm4_moe", {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8}),
    Family("GPT-OSS", "gpt_oss", {"num_local_experts": 4, "head_dim": 8, **MIXED}),
    Family("FlexOlmo", "flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("ERNIE 4.5, experts", "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    Family("MiniMax M2", "minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    Family(
        "Llama 4, text",
        "llama4_text",
        {"num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 8},
    ),
    Family("JetMoE", "jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}),
    Family("Aria, text", "aria_text", {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_topk": 2}),
    # Learned, sinusoidal or linear position biases.
    Family("GPT-2", "gpt2", GPT, common=False, quick=True),
    Family("GPT-1", "openai-gpt", GPT, common=False),
    Family("GPT-J", "gptj", GPT | {"rotary_dim": 4}, common=False),
    Family("CodeGen", "codegen", GPT | {"rotary_dim": 4}, common=False),
    Family("StarCoder", "gpt_bigcode", GPT, common=False),
    Family(
        "GPT-Neo",
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 256,
        },
        common=False,
    ),
    Family("Pythia and GPT-NeoX", "gpt_neox"),
    Family(
        "OPT",
        "opt",
        {"ffn_dim": 48, "max_position_embeddings": 256, "word_embed_proj_dim": 32},
        quick=True,
    ),
    Family("BLOOM", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, common=False, quick=True),
    Family("MPT", "mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, common=False),
    Family("Falcon", "falcon", {"new_decoder_architecture": False}),
    Family("Falcon, linear biases", "falcon", {"alibi": True, "new_decoder_architecture": False}),
    Family(
        "XGLM",
        "xglm",
        {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 512},
        common=False,
    ),
    Family("BioGPT", "biogpt", {"max_position_embeddings": 256}),
    Family("CTRL", "ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 256}, common=False),
    # Recurrent layers, alone or mixed with attention.
    Family(
        "Mamba",
        "mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        common=False,
        quick=True,
        states_from=1,
        refused={"adapters": "incompatible with Mamba-based models"},
    ),
    Family(
        "Mamba 2",
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        common=False,
        states_from=1,
        refused={"adapters": "incompatible with Mamba-based models"},
    ),
    Family(
        "Falcon Mamba",
        "falcon_mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        common=False,
        states_from=1,
        refused={"adapters": "incompatible with Mamba-based models"},
    ),
    Family(
        "RWKV 4",
        "rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48},
        common=False,
        states_from=1,
    ),
    Family(
        "RecurrentGemma",
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
    Family(
        "Jamba",
        "jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    Family(
        "Bamba",
        "bamba",
        {**MAMBA2, "attn_layer_indices": [1]},
    ),
    Family("Falcon-H1", "falcon_h1", MAMBA2, refused={"adapters": "incompatible with Mamba-based models"}),
    Family(
        "Granite 4, mixed",
        "granitemoehybrid",
        {**MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 2},
    ),
    Family("MiniMax", "minimax", {"num_local_experts": 4, "block_size": 8, "head_dim": 8}),
    Family("LFM 2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Family("Qwen3-Next", "qwen3_next", {**EXPERTS, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    Family("Qwen 3.5, text", "qwen3_5_text", LINEAR),
    Family("OLMo, mixed", "olmo_hybrid", {"linear_num_key_heads": 2, "linear_num_value_heads": 2} | {"head_dim": 8}),
    Family("Zamba 2", "zamba2", ZAMBA2, refused={"adapters": "share one weight"}),
    # Not decoders: tokens attend to later tokens.
    Family("BERT", "bert", refused=everywhere("it is an encoder")),
    Family("RoBERTa", "roberta", refused=everywhere("it is an encoder")),
    Family("ELECTRA", "electra", refused=everywhere("it is an encoder")),
)
