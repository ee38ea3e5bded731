"""Hidden states at every layer, and the measures computed from them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import save_model

from lightning_mlc.evaluation.representations import collinearity_by_layer, collinearity_of_extracted, prompt_states
from lightning_mlc.evaluation.systems.generation import LocalModel
from lightning_mlc.evaluation.systems.local import chat_of
from lightning_mlc.evaluation.systems.system import System

TEXTS = ["a", "bb cc dd", "দাম", "a longer one, by far"]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_states_are_those_of_each_prompt_alone(kind: str, batch_tokens: int, tmp_path: Path) -> None:
    system = System("m", str(save_model(tmp_path, kind)))
    local = LocalModel(system.load_model("float32"), chat_of(system), torch.device("cpu"))
    told: list[int] = []
    states = prompt_states(local, CONVERSATIONS, batch_tokens, told.append)
    assert states.shape == (4, 4, 32)  # prompts, embeddings and three layers, features
    assert sum(told) == 4
    for index, text in enumerate(TEXTS):
        ids = local.chat.tokenizer(f"<|user|>{text}<|end|>\n<|assistant|>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = local.model(ids, output_hidden_states=True).hidden_states
        for layer in range(4):
            assert torch.allclose(states[index, layer], expected[layer][0, -1], atol=1e-5)


def test_a_layer_on_one_line_and_one_that_is_not() -> None:
    """Layer 0: translations are multiples of one vector, one of them negative. Layer 1: they are orthogonal."""
    states = torch.zeros(2, 3, 2, 3)
    states[:, :, 0] = torch.tensor([[1.0, 2, 3]]) * torch.tensor([[1.0], [5.0], [-2.0]])
    states[:, :, 1] = torch.eye(3)
    found = collinearity_by_layer(states, torch.ones(2, 3).bool(), center=False)
    assert found["explained_variance"] == pytest.approx([1, 1 / 3])
    assert found["min_cosine"] == pytest.approx([-1, 0])
    assert found["cosines"][0][0] == pytest.approx([1, 1, -1])
    assert found["spectrum"][0] == pytest.approx([1, 0, 0], abs=1e-12)
    assert found["spectrum"][1] == pytest.approx([1 / 3] * 3)


def test_centring_takes_away_what_all_share() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(40, 4, 1, 16, generator=generator)
    shared = 50 * torch.randn(1, 1, 1, 16, generator=generator)
    mask = torch.ones(40, 4).bool()
    raw, centred = (collinearity_by_layer(own + shared, mask, center) for center in (False, True))
    alone = collinearity_by_layer(own - own.mean((0, 1)), mask, center=False)
    assert raw["explained_variance"][0] > 0.99
    assert centred["explained_variance"] == pytest.approx(alone["explained_variance"], rel=1e-4)  # float32 input
    assert centred["explained_variance"][0] < 0.5


def test_prompts_that_lack_a_language_take_no_part_in_it() -> None:
    states = torch.zeros(3, 3, 1, 2)
    states[0, :, 0] = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    states[1, :2, 0] = torch.tensor([[1.0, 0], [0, 1]])
    states[2, 0, 0] = torch.tensor([1.0, 0])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    states[1, 2] = states[2, 1:] = math.nan  # whatever it holds
    found = collinearity_by_layer(states, mask, center=False)
    assert found["cosines"][0][0][:3] == pytest.approx([1, 0.5, 0])
    assert found["min_cosine"] == pytest.approx([0])
    # Squares 2, 1, 0 of three and 1, 1 of two, so 2/3 and 1/2 of the total.
    assert found["explained_variance"] == pytest.approx([(2 / 3 + 1 / 2) / 2])


def test_extracted_states_are_those_of_the_layer_after_the_extractor() -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(5, 3, 4, 8, generator=generator), torch.randn(6, 8, generator=generator)
    mask = torch.ones(5, 3).bool()
    found = collinearity_of_extracted(states, mask, lambda layer: layer @ weight.T, 2)
    expected = collinearity_by_layer((states[:, :, 2] @ weight.T)[:, :, None], mask, center=False)
    assert found == expected
