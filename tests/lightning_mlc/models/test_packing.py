"""Packed rows, and passes that end at a layer, against one padded row for each sequence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MambaConfig, MistralConfig

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenRows, TokenSequence
from lightning_mlc.models.attention import packed_layout
from lightning_mlc.models.loading import enable_checkpointing
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import self_check

SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WINDOWED: dict[str, Any] = {
    # Shorter than the sequences below. Mistral's layers are all of one type, Gemma's of two.
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=6, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
}
KINDS = [(kind, "eager") for kind in (*CONFIGS, *WINDOWED)] + [
    (kind, "sdpa")
    for kind in (*CONFIGS, *WINDOWED)
    if kind != "gemma2"  # transformers runs it only in eager mode
]


def sequences() -> list[TokenSequence]:
    """Pairs and prompts of many lengths, up to five windows long. No two rows share a token."""
    random = torch.Generator().manual_seed(1)
    rows: list[TokenSequence] = []
    for example, (prompt, chosen, rejected) in enumerate([(3, 9, 5), (14, 2, 17), (1, 1, 1), (8, 0, 12)]):
        draw = torch.randint(5, 250, (prompt + chosen + rejected,), generator=random).tolist()
        tokens, first, second = draw[:prompt], draw[prompt : prompt + chosen], draw[prompt + chosen :]
        if first:
            rows.append(TokenSequence(tokens, first, example, 0, CHOSEN))
        rows.append(TokenSequence(tokens, second, example, 0, REJECTED, leads=not first))
    for language, length in enumerate([2, 30, 11, 7], start=1):
        rows.append(
            TokenSequence(torch.randint(5, 250, (length,), generator=random).tolist(), (), 0, language, NO_RESPONSE)
        )
    return rows


def load(kind: str, folder: Path, attention: str, dtype: torch.dtype = torch.float64) -> Any:
    keywords: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    torch.manual_seed(0)
    if kind in WINDOWED:
        model = AutoModelForCausalLM.from_config(WINDOWED[kind], **keywords)
    else:
        model = AutoModelForCausalLM.from_pretrained(save_model(folder / kind, kind), **keywords)
    # At their initial size the weights hardly mix tokens, and a wrong mask would hardly show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(8)
    return model.eval()  # GPT-2 has dropout


def one_by_one(policy: Policy, rows: list[TokenSequence], layer: int) -> tuple[Tensor, Tensor]:
    outputs = [policy(TokenRows.pad([row], 0), layer) for row in rows]
    return torch.cat([output.logps for output in outputs]), torch.cat([output.states for output in outputs])


def in_blocks(policy: Policy, rows: list[TokenSequence], layer: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Results in the order of ``rows``, found from the place of each sequence."""
    place = {(row.example, row.language, row.kind): index for index, row in enumerate(rows)}
    logps, states = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
    answers = [row for row in rows if row.response]
    prompts = [row for row in rows if not row.response]
    for block in (*layout.blocks(answers, 0), *layout.blocks(prompts, 0)):
        output = policy(block, layer)
        for i, where in enumerate(
            zip(block.example.tolist(), block.language.tolist(), block.kind.tolist(), strict=True)
        ):
            logps[place[where]], states[place[where]] = output.logps[i], output.states[i]
    return torch.stack(logps), torch.stack(states)


def gradients(policy: Policy, found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    policy.zero_grad()
    logps, states = found
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)  # each sequence has a different weight
    directions = torch.randn(states.shape, generator=torch.Generator().manual_seed(2)).to(states.dtype)
    ((logps * weights).sum() + (states * directions).sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * float(gradient.abs().max()))


@pytest.mark.parametrize("layer", [3, 1])
@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_packed_rows_give_what_sequences_give_alone(tmp_path: Path, kind: str, attention: str, layer: int) -> None:
    policy = Policy(load(kind, tmp_path, attention))
    self_check(policy, layer)
    rows = sequences()
    expected = one_by_one(policy, rows, layer)
    expected_gradients = gradients(policy, expected)
    layout = packed_layout(attention)
    assert layout is not None
    for tried in (layout, Layout(packed=True, share_prompts=False)):
        found = in_blocks(policy, rows, layer, tried)
        # The order of float64 sums differs, and transformers computes some functions and the rotary angles in float32.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert_same(gradients(policy, found), expected_gradients, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_bfloat16_packing_is_no_further_from_float64_than_padding(tmp_path: Path, attention: str) -> None:
    rows = sequences()
    exact = one_by_one(Policy(load("llama", tmp_path, attention)), rows, 3)
    policy = Policy(load("llama", tmp_path, attention, torch.bfloat16))
    layout = packed_layout(attention)
    assert layout is not None
    errors = [
        [float((part.double() - right).norm() / right.norm()) for part, right in zip(found, exact, strict=True)]
        for found in (one_by_one(policy, rows, 3), in_blocks(policy, rows, 3, layout))
    ]
    for padded, packed in zip(*errors, strict=True):
        assert padded > 1e-4  # bfloat16 does round
        assert packed < 2 * padded


def test_adapters_and_gradient_checkpointing_work_with_packed_rows(tiny_model: Path) -> None:
    gradients_of = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        if checkpointing:
            enable_checkpointing(model)
        policy = Policy(add_lora(model, LoRA(r=4))).train()
        torch.manual_seed(1)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        gradients_of += [
            gradients(policy, in_blocks(policy, sequences(), 2, layout)) for layout in (Layout(), Layout(packed=True))
        ]
    for found in gradients_of[1:]:
        assert_same(found, gradients_of[0], rtol=1e-3)  # float32


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_prompts_run_no_layer_above_the_one_asked_for(tiny_model: Path, layer: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    runs: list[int] = []
    for index, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda *_, index=index: runs.append(index))
    policy = Policy(model)
    self_check(policy, layer)
    runs.clear()
    policy(TokenRows.pad([TokenSequence((7, 8), (), 0, 1, NO_RESPONSE)], 0), layer)
    assert runs == list(range(layer))
    assert len(model.model.layers) == 3  # all of them are back in their places
    runs.clear()
    policy(TokenRows.pad([TokenSequence((7, 8), (9,), 0, 0, CHOSEN)], 0), layer)
    assert runs[-3:] == [0, 1, 2]


def test_the_layers_are_back_after_a_failure(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = TokenRows.pad([TokenSequence((7, 10_000), (), 0, 1, NO_RESPONSE)], 0)  # no such token exists
    policy = Policy(model)
    self_check(policy, 1)
    with pytest.raises(IndexError):
        policy(rows, 1)
    assert len(model.model.layers) == 3


def test_a_model_whose_tokens_see_all_before_them_is_not_packed(caplog: pytest.LogCaptureFixture) -> None:
    recurrent = MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    with caplog.at_level(logging.WARNING):
        assert not self_check(Policy(AutoModelForCausalLM.from_config(recurrent))).layout.packed
    assert "MambaForCausalLM cannot run packed rows" in caplog.text
    caplog.clear()
    assert self_check(Policy(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)))).layout.packed
    assert not caplog.records


def test_a_mask_that_is_not_heeded_is_noticed(tmp_path: Path) -> None:
    """A fault in the responses' mask is enough: here both see their prompt, and the second also sees the first."""
    model = load("llama", tmp_path, "sdpa", torch.float32)
    assert self_check(Policy(model)).layout.packed
    decode = model.model.forward

    def deaf(attention_mask: Tensor | None = None, **rest: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 4:
            width = attention_mask.shape[-1]
            attention_mask = torch.ones(1, 1, width, width, dtype=torch.bool).tril()
        return decode(attention_mask=attention_mask, **rest)

    model.model.forward = deaf
    assert not self_check(Policy(model)).layout.packed


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex and flash attention train only on a GPU")


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_for_gpus_gives_what_padded_rows_give(tmp_path: Path, attention: str) -> None:
    if attention.startswith("flash"):
        pytest.importorskip("flash_attn", reason="flash attention is a separate package")
    sizes = SIZES | {"hidden_size": 128, "num_attention_heads": 2}  # heads of width 64, which the kernels need
    results = []
    for name in ("sdpa", attention):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16, attn_implementation=name)
        policy = Policy(model.cuda())
        layout = packed_layout(name) if name == attention else Layout()
        assert layout is not None
        blocks = [block.to("cuda") for block in layout.blocks([r for r in sequences() if r.response], 0)]
        outputs = [policy(block, 3) for block in blocks]
        order = torch.cat([block.example * 2 + block.kind for block in blocks]).argsort()
        results.append((torch.cat([o.logps for o in outputs])[order], torch.cat([o.states for o in outputs])[order]))
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.05)  # bfloat16, other kernels
