"""A prompt gets the same response in a batch as alone, even from models that attend to the padding."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from families.architectures import FAMILIES
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from lightning_mlc.data.rows import NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.errors import UserError
from lightning_mlc.models import left_padding
from lightning_mlc.models.greedy import generate_greedily
from lightning_mlc.models.policy import Policy

VOCABULARY, END, PAD = 260, 3, 0
PROMPTS = [[5 + 7 * i * (k + 3) % 200 for i in range(length)] for k, length in enumerate((17, 3, 17, 29, 8))]


def make(kind: str) -> PreTrainedModel:
    family = next(family for family in FAMILIES if family.model_type == kind)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(family.config(VOCABULARY, END, PAD))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "time_" in name:  # so large that responses depend on the prompts and differ
                parameter.normal_(0, 0.4)
    return model.eval()


def rows_of(prompts: list[list[int]]) -> TokenRows:
    return TokenRows.pad([TokenSequence(prompt, (), 0, 0, NO_RESPONSE) for prompt in prompts], PAD, "left")


def defined(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """The definition: repeat the most likely token, each from a full pass without cache, padding or batch."""
    found: list[int] = []
    while len(found) < new_tokens and END not in found:
        with torch.no_grad():
            found.append(int(model(torch.tensor([prompt + found]), use_cache=False).logits[0, -1].argmax()))
    return found


def up_to_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END) + 1] if END in ids else ids


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts in each call of ``generate``, without trials."""
    seen: list[int] = []
    generate = GenerationMixin.generate

    def spy(self: GenerationMixin, input_ids: torch.Tensor, **options: Any) -> Any:
        if "output_logits" not in options:
            seen.append(len(input_ids))
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    return seen


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma", "mamba", "llama"])
@pytest.mark.parametrize("known", [True, False])
def test_a_batch_gives_what_each_prompt_gives_alone(
    kind: str, known: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Models that are known to attend to padding, and the same models found by a trial."""
    if not known:
        monkeypatch.setattr(left_padding, "SEES_PADDING", frozenset())
    model = make(kind)
    expected = [defined(model, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(response) for response in expected}) > 3  # otherwise nothing would be compared
    with caplog.at_level(logging.WARNING, "lightning_mlc"):
        for _ in range(2):
            found = generate_greedily(model, rows_of(PROMPTS), 6, [END], PAD)
    assert found.shape[0] == len(PROMPTS)
    assert [up_to_end(row) for row in found[:, max(map(len, PROMPTS)) :].tolist()] == expected
    alone = kind in ("rwkv", "recurrent_gemma")
    assert calls == ([1] * 2 * len(PROMPTS) if alone else [len(PROMPTS)] * 2)
    said = [record.message for record in caplog.records if record.name == "lightning_mlc"]
    assert len(said) == alone
    assert all("one prompt at a time" in line for line in said)


def test_responses_that_end_early_are_padded(calls: list[int]) -> None:
    model = make("rwkv")
    first = defined(model, PROMPTS[0], 1)[0]
    found = generate_greedily(model, rows_of(PROMPTS[:2]), 6, [first], PAD)
    width = len(PROMPTS[0])
    assert found[0].tolist() == [*PROMPTS[0], first, *[PAD] * (found.shape[1] - width - 1)]
    assert found[1, : width - 3].tolist() == [PAD] * (width - 3)
    assert found[1, width - 3 : width].tolist() == PROMPTS[1]


def test_a_prompt_alone_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_padding, "_agree", lambda *_: pytest.fail("tried"))
    generate_greedily(make("llama"), rows_of(PROMPTS[:1]), 2, [END], PAD)


def test_a_model_that_stumbles_over_a_batch_runs_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    forward = model.forward

    def stumbling(input_ids: torch.Tensor, **options: Any) -> Any:
        if len(input_ids) > 1:
            raise RuntimeError("a mask of that shape")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", stumbling)
    found = Policy(model).generate(rows_of(PROMPTS), 4, [END], PAD, together=False)
    expected = [defined(model, prompt, 4) for prompt in PROMPTS]
    assert [up_to_end(row) for row in found[:, max(map(len, PROMPTS)) :].tolist()] == expected


def test_a_model_shared_out_over_processes_is_refused_where_prompts_are_run_alone() -> None:
    with pytest.raises(UserError, match=r"RwkvForCausalLM generates from one prompt at a time, .* on one device"):
        generate_greedily(make("rwkv"), rows_of(PROMPTS), 2, [END], PAD, together=True)


def test_processes_that_meet_try_a_model_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process may have a single prompt and another one several, but both must run the same number of passes."""
    tried: list[str] = []
    monkeypatch.setattr(left_padding, "_agree", lambda *_: tried.append("") or True)
    monkeypatch.setattr(GenerationMixin, "generate", lambda _, input_ids, **__: input_ids)
    for model, prompts in ((make("llama"), PROMPTS[:1]), (make("llama"), PROMPTS)):
        generate_greedily(model, rows_of(prompts), 2, [END], PAD, together=True)
    assert len(tried) == 2
