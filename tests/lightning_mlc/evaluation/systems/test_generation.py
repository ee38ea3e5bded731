"""Greedy responses do not depend on batches or interruptions."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from transformers import GenerationConfig

from lightning_mlc.data.rows import NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.data.turns import end_tokens
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import Key
from lightning_mlc.evaluation.systems.generation import (
    LocalModel,
    Response,
    TransformersGenerator,
    VLLMGenerator,
    plan_batches,
)
from lightning_mlc.evaluation.systems.local import chat_of, check_lengths, context_length
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.models.greedy import generate_greedily
from lightning_mlc.models.policy import Policy

TEXTS = ["a", "bb " * 5, "ccc", "দাম না দিয়ে", "e" * 40, "ff", "g " * 11]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]


def local(folder: Path, room: int = 8) -> LocalModel:
    system = System("m", str(folder))
    return LocalModel(system.load_model("float32"), chat_of(system, room), torch.device("cpu"))


def greedy(model: LocalModel, conversation: list[dict[str, str]], new_tokens: int, ends: list[int]) -> list[int]:
    """The definition: repeat the most likely token, each from a full pass without cache or padding."""
    ids: list[int] = model.chat.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    found: list[int] = []
    while len(found) < new_tokens and not (found and found[-1] in ends):
        with torch.no_grad():
            found.append(int(model.model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


def one_at_a_time(model: LocalModel, new_tokens: int) -> list[Response]:
    tokenizer, ends = model.chat.tokenizer, end_tokens(model.model, model.chat.tokenizer)
    found = [greedy(model, conversation, new_tokens, ends) for conversation in CONVERSATIONS]
    return [Response(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids[-1] in ends) for ids in found]


@pytest.fixture(scope="module", params=[("llama", 0.5), ("gemma2", 0.02)], ids=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    # A scale at which responses differ between prompts.
    kind, scale = request.param
    return local(save_model(tmp_path_factory.mktemp("models"), kind, initializer_range=scale))


def test_nothing_of_the_models_own_settings_counts_in_predict_and_evaluate(model: LocalModel) -> None:
    """Everything that transformers would read from the generation configuration is ignored, but not removed."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    rows, ends = TokenRows.pad([TokenSequence(ids[0].tolist(), (), 0, 0, NO_RESPONSE)], 0), [3]
    plain = generate_greedily(model.model, rows, 12, ends, 0)
    own = model.model.generation_config
    settings = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 12, "suppress_tokens": [5, 6]}
    model.model.generation_config = GenerationConfig(**settings, do_sample=True, temperature=9.0, num_beams=3)
    try:
        assert not torch.equal(model.model.generate(ids, max_new_tokens=12), plain)
        assert torch.equal(generate_greedily(model.model, rows, 12, ends, 0), plain)
        assert torch.equal(Policy(model.model).generate(rows, 12, ends, 0, together=False), plain)
        assert model.model.generation_config.repetition_penalty == 9.0
    finally:
        model.model.generation_config = own


@pytest.mark.parametrize("batch_tokens", [1, 200, 10**6])
def test_batches_give_what_one_at_a_time_does(model: LocalModel, batch_tokens: int) -> None:
    expected = one_at_a_time(model, 8)
    assert len({response.text for response in expected}) > 3  # otherwise nothing would be compared
    found = dict(TransformersGenerator(model, 8, batch_tokens).generate(CONVERSATIONS, set()))
    assert [found[index] for index in range(len(TEXTS))] == expected


def test_what_is_done_is_not_generated_and_the_rest_is_as_before(model: LocalModel) -> None:
    whole = dict(TransformersGenerator(model, 8, 200).generate(CONVERSATIONS, set()))
    done = {0, 4, 5}
    found = dict(TransformersGenerator(model, 8, 200).generate(CONVERSATIONS, done))
    assert found == {index: response for index, response in whole.items() if index not in done}


def test_batches_do_not_depend_on_what_is_done(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an interrupted run could end with other responses, because padding changes the last bits."""
    shapes: list[tuple[int, ...]] = []
    generate = model.model.generate

    def spy(**keywords: Any) -> Any:
        if "output_logits" not in keywords:  # otherwise this is the trial of a new model
            shapes.append(tuple(keywords["input_ids"].shape))
        return generate(**keywords)

    monkeypatch.setattr(model.model, "generate", spy)
    generator = TransformersGenerator(model, 8, 100)
    list(generator.generate(CONVERSATIONS, set()))
    whole = list(shapes)
    shapes.clear()
    batches = plan_batches([len(model.chat.prompt(text, "")[0]) for text in CONVERSATIONS], 100, 8)
    assert len(batches) > 2
    list(generator.generate(CONVERSATIONS, {*batches[0], batches[1][0]}))
    assert shapes == whole[1:]


def test_the_models_own_sampling_settings_change_nothing(tmp_path: Path) -> None:
    model = local(save_model(tmp_path, initializer_range=0.5))
    before = dict(TransformersGenerator(model, 8, 500).generate(CONVERSATIONS, set()))
    config = model.model.generation_config
    config.repetition_penalty, config.do_sample, config.top_k, config.no_repeat_ngram_size = 5.0, True, 3, 1
    config.temperature, config.num_beams, config.max_new_tokens = 0.1, 3, 2
    assert dict(TransformersGenerator(model, 8, 500).generate(CONVERSATIONS, set())) == before


def test_responses_end_at_any_of_the_models_end_tokens(tmp_path: Path) -> None:
    model = local(save_model(tmp_path, initializer_range=0.5))
    first, second = greedy(model, CONVERSATIONS[1], 2, [])
    assert first != second
    model.model.generation_config.eos_token_id = [model.chat.tokenizer.eos_token_id, second]
    assert end_tokens(model.model, model.chat.tokenizer) == sorted([model.chat.tokenizer.eos_token_id, second])
    found = dict(TransformersGenerator(model, 8, 500).generate(CONVERSATIONS, set()))[1]
    assert found == Response(model.chat.tokenizer.decode([first, second]).strip(), True)


def test_plan_stays_within_its_budget_and_puts_the_longest_first() -> None:
    lengths = [5, 100, 7, 7, 60, 5, 1]
    batches = plan_batches(lengths, 150, 10)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches[0] == [1]
    assert all((lengths[batch[0]] + 10) * len(batch) <= 150 for batch in batches)
    assert [lengths[batch[0]] for batch in batches] == sorted((lengths[batch[0]] for batch in batches), reverse=True)
    assert plan_batches([500], 10, 10) == [[0]]
    assert plan_batches([], 10, 10) == []


def test_a_prompt_without_room_for_a_response_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    system = System("m", str(save_model(tmp_path, max_position_embeddings=64)))
    assert context_length(system) == 64
    prompts = [(Key("set", f"r{i}", "sw"), [{"role": "user", "content": "x" * n}]) for i, n in enumerate([10, 53])]
    check_lengths(system, chat_of(system, 8), prompts[:1], 8)
    with pytest.raises(UserError, match=r"'r1' \(sw\) of the set 'set': is too long for m, which takes 64 tokens"):
        check_lengths(system, chat_of(system, 8), prompts, 8)


def test_vllm_is_given_the_same_tokens(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the interface of ``vllm.LLM``, which runs the same model."""

    class LLM:
        calls: list[int] = []  # noqa: RUF012

        def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
            assert (sampling.temperature, sampling.max_tokens, use_tqdm) == (0.0, 8, False)
            self.calls.append(len(prompts))
            return [self.one(prompt["prompt_token_ids"]) for prompt in prompts]

        def one(self, ids: list[int]) -> Any:
            generated = model.model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0
            )[0, len(ids) :]
            text = model.chat.tokenizer.decode(generated, skip_special_tokens=True)
            ended = int(generated[-1]) == model.chat.tokenizer.eos_token_id
            output = types.SimpleNamespace(text=text, finish_reason="stop" if ended else "length")
            return types.SimpleNamespace(outputs=[output])

    vllm = types.ModuleType("vllm")
    vllm.SamplingParams = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    found = dict(VLLMGenerator(LLM(), model.chat, 8, chunk=3).generate(CONVERSATIONS, {2}))
    expected = one_at_a_time(model, 8)
    assert found == {index: expected[index] for index in range(len(TEXTS)) if index != 2}
    assert LLM.calls == [3, 3]
