"""The self-check of a model, and the model's results after it, against ``transformers`` run on each sequence alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BertConfig,
    BloomConfig,
    DeepseekV4Config,
    Gemma3Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenSequence
from lightning_mlc.errors import UserError
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import self_check
from lightning_mlc.models.trials import TOLERANCES, tolerance_of, trial_length, windows

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
VISION = {**SIZES, "image_size": 28, "patch_size": 14}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "opt": lambda: OPTConfig(vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4),
    "opt whose last states are narrower": lambda: OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "llama4": lambda: Llama4TextConfig(
        **GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16
    ),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=128,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "bloom": lambda: BloomConfig(vocab_size=128, hidden_size=32, n_layer=3, n_head=4),
    "mamba": lambda: MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=3, state_size=4, pad_token_id=0),
    "rwkv": lambda: RwkvConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32, intermediate_size=48
    ),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(**GROUPED, lru_width=32, attention_window_size=16),
    "bamba": lambda: BambaConfig(
        **GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "multimodal, with as many layers for images": lambda: Gemma3Config(
        text_config={
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    ),
}
PACKED = {
    "llama",
    "opt",
    "opt whose last states are narrower",
    "multimodal, with as many layers for images",
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[kind]()).eval()


def sequences() -> list[TokenSequence]:
    """Sequences of different lengths, longer than the windows above, and not those of the trial."""
    drawn = torch.randint(5, 110, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    tokens = iter(drawn)

    def take(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    first = take(7)
    return [
        TokenSequence(first, take(21), 0, 0, CHOSEN),
        TokenSequence(first, take(4), 0, 0, REJECTED, leads=False),
        TokenSequence(take(30), take(3), 1, 0, CHOSEN),
        TokenSequence(take(3), take(6), 1, 1, CHOSEN),
    ]


def expected(model: Any, row: TokenSequence, layer: int) -> tuple[Tensor, Tensor]:
    """Log-probability of the response, and hidden state at the end of the prompt."""
    kept: list[Tensor] = []
    output = model(torch.tensor([[*row.prompt, *row.response]]), use_cache=False, output_hidden_states=True)
    end = len(row.prompt) - 1
    logps = output.logits[0, end:-1].log_softmax(-1).gather(1, torch.tensor(row.response)[:, None]).sum()
    states = output.hidden_states
    if type(model).__name__ in ("MambaForCausalLM", "RwkvForCausalLM"):  # these leave out the embeddings
        kept = [torch.empty(0), *states[:-2], states[-1]]
        return logps, kept[layer][0, end]
    return logps, states[layer][0, end]


@torch.no_grad()
@pytest.mark.parametrize("layer", ["middle", "last"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_was_found_right_is_right(kind: str, layer: str) -> None:
    model = build(kind)
    depth = model.config.get_text_config().num_hidden_layers
    wanted = depth if layer == "last" else 1
    policy = Policy(model)
    checked = self_check(policy, wanted)
    assert checked.layout.packed == (kind in PACKED)
    assert all(checked.shortcuts)
    rows = {(row.example, row.language, row.kind): row for row in sequences()}
    prompts = [
        TokenSequence(row.prompt, (), row.example, row.language, NO_RESPONSE) for row in rows.values() if row.leads
    ]
    for block in (*checked.layout.blocks(list(rows.values()), 0), *checked.layout.blocks(prompts, 0)):
        found = policy(block, wanted)
        assert found.states is not None
        for index, (example, language, what) in enumerate(
            zip(block.example.tolist(), block.language.tolist(), block.kind.tolist(), strict=True)
        ):
            row = rows[example, language, CHOSEN if what == NO_RESPONSE else what]
            logp, state = expected(model, row, wanted)
            # the order of float32 sums differs; at most 21 tokens
            torch.testing.assert_close(found.states[index], state, rtol=1e-4, atol=1e-5)
            assert found.states.shape[1] == checked.width
            if block.longest_response:
                torch.testing.assert_close(found.logps[index], logp, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_over_prompts_ends_at_the_layer(kind: str) -> None:
    """For any number of rows, and whatever a layer returns in addition to the states."""
    policy = Policy(build(kind))
    checked = self_check(policy, 1)
    runs: list[int] = []
    for index, layer in enumerate(policy.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    for count in (1, 2, 3):
        rows = [TokenSequence(range(5, 9 + i), (), i, 0, NO_RESPONSE) for i in range(count)]
        for block in checked.layout.blocks(rows, 0):
            policy(block, 1)
    assert set(runs) == {0}


def test_a_window_by_the_place_in_a_row_shows_on_rows_longer_than_it(caplog: pytest.LogCaptureFixture) -> None:
    """Shorter rows never exceed the window, so they are packed."""
    config = MODELS["gpt_neo"]()
    config.window_size = 32
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config).eval())
    with caplog.at_level(logging.WARNING, "lightning_mlc"):
        assert not self_check(policy, 2, longest=33).layout.packed
    assert "GPTNeoForCausalLM cannot run packed rows (" in caplog.text
    assert self_check(policy, 2, longest=32).layout.packed


def test_every_window_that_the_configuration_names() -> None:
    assert windows(MODELS["gpt_neo"]()) == [16]
    assert windows(MistralConfig(**GROUPED, sliding_window=20)) == [20]
    assert windows(LlamaConfig(**GROUPED)) == []
    assert {16, 8192} <= set(windows(MODELS["llama4"]()))  # a chunk, and the limit from which positions are scaled
    config = MistralConfig(**GROUPED, sliding_window=20)
    assert [trial_length(config, longest) for longest in (None, 21, 20, 5)] == [20, 20, 0, 0]


def test_an_encoder_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BertConfig(**SIZES)).eval()
    with pytest.raises(
        UserError, match=r"^model\.name_or_path: tokens of BertLMHeadModel see those after them \(.*enc"
    ):
        self_check(Policy(model))


def test_logits_that_are_not_finite_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED))
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"^model\.name_or_path: the logits of LlamaForCausalLM are not finite"):
        self_check(Policy(model.eval()))


def test_padding_that_matters_is_refused() -> None:
    """Then there is no correct way to run a batch."""
    model = build("llama")
    decode = model.model.forward

    def sees_padding(attention_mask: Tensor | None = None, **rest: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 2:
            rest["inputs_embeds"] = model.model.embed_tokens(rest.pop("input_ids")) * (
                2 - attention_mask.float().mean()
            )
        return decode(attention_mask=attention_mask, **rest)

    model.model.forward = sees_padding
    with pytest.raises(
        UserError, match=r"^model\.name_or_path: padding changes what LlamaForCausalLM gives \(.* differ"
    ):
        self_check(Policy(model), packing=False)


@torch.no_grad()
def test_states_that_do_not_pass_where_they_are_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    """Here the second layer changes its own input, before its states are recorded."""
    model = build("llama")
    policy = Policy(model)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[1], layers[0], layers[2]])
    run = model.model.forward

    def in_order(**keywords: Any) -> Any:
        wrong = model.model.layers
        model.model.layers = layers
        try:
            return run(**keywords)
        finally:
            model.model.layers = wrong

    model.model.forward = in_order
    with caplog.at_level(logging.WARNING, "lightning_mlc"):
        checked = self_check(policy, 1)
    assert not checked.shortcuts.early_end
    assert "LlamaForCausalLM is run the plain way" in caplog.text
    (block,) = checked.layout.blocks([TokenSequence((7, 8, 9), (10,), 0, 0, CHOSEN)], 0)
    _, state = expected(model, TokenSequence((7, 8, 9), (10,), 0, 0, CHOSEN), 1)
    torch.testing.assert_close(policy(block, 1).states[0], state, rtol=1e-4, atol=1e-5)


def test_a_model_that_can_do_all_is_run_six_times() -> None:
    """Four sequences alone, all of them packed, and their prompts packed. Few passes, because each reads all
    weights."""
    model = build("llama")
    tokens: list[int] = []
    model.model.register_forward_hook(lambda _module, _inputs, output: tokens.append(output[0].shape[:2].numel()))
    self_check(Policy(model), 2)
    assert len(tokens) == 6
    assert sum(tokens) < 80


def test_no_hooks_are_left_behind() -> None:
    """The hooks of ``output_hidden_states`` break the graph of a compiled layer."""
    model = build("llama")
    self_check(Policy(model), 1)
    assert not any(module._forward_hooks for module in model.modules())
    output = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert len(output.hidden_states) == 4


def test_a_layer_with_several_states_for_each_token_is_refused() -> None:
    """DeepSeek V4 keeps several states per token, and merges them after its last layer."""
    torch.manual_seed(0)
    config = DeepseekV4Config(
        **GROUPED | {"num_hidden_layers": 2},
        head_dim=16,
        q_lora_rank=8,
        o_groups=2,
        o_lora_rank=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        index_n_heads=2,
        index_head_dim=16,
        hc_mult=3,
    )
    policy = Policy(AutoModelForCausalLM.from_config(config))
    assert self_check(policy, 2).width == GROUPED["hidden_size"]
    with pytest.raises(
        UserError, match=r"^model\.consistency\.layer: layer 1 of .* has 3 hidden states for each token"
    ):
        self_check(policy, 1)


def test_autocast_allows_the_rounding_of_its_dtype(tiny_model: Path) -> None:
    """A CPU without bfloat16 units rounds a product of a padded batch in another way than that of a row alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert tolerance_of(model) == TOLERANCES[torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert tolerance_of(model) == TOLERANCES[torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert tolerance_of(model) == TOLERANCES[torch.float32]
