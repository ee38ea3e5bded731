"""Likelihoods of responses, against a pass over each response alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_model

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.likelihood import Likelihood, Openings, Scorer
from lightning_mlc.evaluation.systems.generation import LocalModel
from lightning_mlc.evaluation.systems.local import chat_of, context_length, load
from lightning_mlc.evaluation.systems.system import System

PROMPTS = [[{"role": "user", "content": text}] for text in ("a", "bb cc", "দাম", "a longer one, by far")]
RESPONSES = [("No.", "Yes, sure"), ("x", "y"), ("Sorry", ""), ("No.", "Yes, sure", "Maybe")]


def local(folder: Path) -> LocalModel:
    system = System("m", str(folder))
    return LocalModel(system.load_model("float32"), chat_of(system), torch.device("cpu"))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return local(save_model(tmp_path_factory.mktemp("models"), request.param, initializer_range=0.3))


def alone(model: LocalModel, prompt: str, response: str, ended: bool) -> Likelihood:
    """The tokens, written by hand from the template of the tests' tokenizer: one for each byte."""
    tokenizer = model.chat.tokenizer
    before = tokenizer(f"<|user|>{prompt}<|end|>\n<|assistant|>", add_special_tokens=False)["input_ids"]
    after = tokenizer(response + ("<|end|>" if ended else ""), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logps = model.model(torch.tensor([before + after])).logits[0].double().log_softmax(1)
    total = sum(float(logps[len(before) - 1 + i, token]) for i, token in enumerate(after))
    return Likelihood(total, len(after))


@pytest.mark.parametrize("batch_tokens", [1, 120, 10**6])
@pytest.mark.parametrize("ended", [True, False])
def test_likelihoods_are_those_of_each_response_alone(model: LocalModel, batch_tokens: int, ended: bool) -> None:
    responses = [tuple(text or "z" for text in texts) for texts in RESPONSES]
    found = dict(Scorer(model, batch_tokens).score(PROMPTS, responses, set(), ended))
    for index, texts in enumerate(responses):
        for one, text in zip(found[index], texts, strict=True):
            expected = alone(model, PROMPTS[index][0]["content"], text, ended)
            assert one.tokens == expected.tokens
            assert one.logp == pytest.approx(expected.logp, rel=1e-4)  # float32 over packed rows


def test_beginnings_and_whole_responses_together(model: LocalModel) -> None:
    ((_, found),) = Scorer(model, 500).score(PROMPTS[:1], [("yes", "yes")], set(), [True, False])
    for one, ended in zip(found, (True, False), strict=True):
        expected = alone(model, PROMPTS[0][0]["content"], "yes", ended)
        assert one.tokens == expected.tokens
        assert one.logp == pytest.approx(expected.logp, rel=1e-4)


def test_an_empty_response_is_its_end(model: LocalModel) -> None:
    ((_, found),) = Scorer(model, 500).score(PROMPTS[2:3], RESPONSES[2:3], set(), True)
    assert found[1].tokens == 1
    assert found[1].logp == pytest.approx(alone(model, "দাম", "", True).logp, rel=1e-4)


def test_what_is_done_is_left_out(model: LocalModel) -> None:
    assert set(dict(Scorer(model, 100).score(PROMPTS, RESPONSES, {0, 3}, True))) == {1, 2}


def test_margin_by_hand() -> None:
    openings = Openings(refusals=("a", "b"), compliances=("c",))
    found = [Likelihood(-6.0, 3), Likelihood(-2.0, 2), Likelihood(-8.0, 2)]
    assert openings.margin(found) == pytest.approx((-2 - 1) / 2 - (-4))


def test_a_model_that_was_taught_to_refuse_has_the_higher_margin(tmp_path: Path) -> None:
    """Three steps on one refusal, measured by openings that include it."""
    model = local(save_model(tmp_path, initializer_range=0.1))
    openings = Openings()

    def margin() -> float:
        ((_, found),) = Scorer(model, 2000).score(PROMPTS[:1], [openings.texts], set(), False)
        return openings.margin(found)

    before = margin()
    prompt, _ = model.chat.prompt(PROMPTS[0], "")
    ids = torch.tensor([prompt + model.chat.response(PROMPTS[0], openings.refusals[0])])
    optimizer = torch.optim.SGD(model.model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model.model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert margin() > before + 0.01


def test_openings_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "openings.json"
    path.write_text(json.dumps({"refusals": ["Hapana."], "compliances": ["Ndiyo.", "Sawa."]}))
    assert Openings.read(str(path)).texts == ("Hapana.", "Ndiyo.", "Sawa.")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"refusals": ["a"]}',
        '{"refusals": [], "compliances": ["a"]}',
        '{"refusals": [1], "compliances": ["a"]}',
        '{"refusals": "a", "compliances": [" "]}',
    ],
)
def test_openings_that_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "openings.json"
    path.write_text(content)
    with pytest.raises(UserError, match="openings: "):
        Openings.read(str(path))
    with pytest.raises(UserError, match="openings: "):
        Openings.read(str(tmp_path / "gone.json"))


def test_openings_are_lists(tmp_path: Path) -> None:
    path = tmp_path / "openings.json"
    path.write_text('{"refusals": "Sorry", "compliances": ["Sure"]}', encoding="utf-8")
    with pytest.raises(UserError, match="openings: "):
        Openings.read(str(path))


def test_where_a_response_is_cut_depends_on_the_model_alone(tiny_model: Path) -> None:
    """Room that generation would need must not shorten the measured response."""
    system, messages = System("m", str(tiny_model)), [{"role": "user", "content": "a"}]
    prompt, _ = chat_of(system).prompt(messages, "it")
    tokens = []
    for room in (0, context_length(system) - len(prompt) - 2):
        local = load(system, chat_of(system, room), torch.device("cpu"), "float32")
        ((_, (found,)),) = Scorer(local, 512).score([messages], [["a b c d e f g h"]], (), True)
        tokens.append(found.tokens)
    assert tokens[0] == tokens[1] > 2
