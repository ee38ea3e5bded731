"""The plain reference: losses and their gradients by definition. It uses nothing of the product.

Each sequence runs alone and without padding through the unchanged transformers model, with all logits and all hidden
states. DPO (arXiv 2305.18290, equation 7) and MLC (arXiv 2602.16660) are written out on top of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

BETA = 0.1
TEMPERATURE = 0.2


class Tokens(NamedTuple):
    """A prompt with its generation header, and perhaps a response that ends its turn."""

    prompt: tuple[int, ...]
    response: tuple[int, ...] = ()


class Found(NamedTuple):
    """The outputs for one sequence."""

    logp: Tensor
    """() summed log-probability of the response."""
    state: Tensor
    """(H,) hidden state of the layer at the prompt's last token."""


def tokens_of(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str = "") -> Tokens:
    """The ids of one turn, in the format of the test model's template."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Tokens(ids(f"<|user|>{prompt}<|end|>\n<|assistant|>"), ids(f"{response}<|end|>") if response else ())


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the transformers model. Experts run one after the other, because their joint product lacks float64."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = model.config.get_text_config()
    if getattr(config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")
    return model


def run(model: PreTrainedModel, tokens: Tokens, layer: int) -> Found:
    ids = torch.tensor([[*tokens.prompt, *tokens.response]])
    output: Any = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    end = len(tokens.prompt)
    logps = output.logits[0, end - 1 : -1].log_softmax(-1)
    logp = logps.gather(1, ids[0, end:, None]).sum() if tokens.response else logps.new_zeros(())
    return Found(logp, output.hidden_states[layer][0, end - 1])


def dpo(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
    margin = BETA * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return torch.log1p(torch.exp(-margin))


def mlc(states: Sequence[Tensor]) -> Tensor:
    """() loss of one prompt's representations in two or more languages."""
    rows = torch.stack([state / state.square().sum().sqrt() for state in states])
    values = torch.linalg.svd(rows, full_matrices=False)[1]
    scaled = values / (values[0].detach() * TEMPERATURE)
    return torch.log(torch.exp(scaled).sum()) - scaled[0]


class Example(NamedTuple):
    chosen: Tokens
    rejected: Tokens
    translations: tuple[Tokens, ...]


class Step(NamedTuple):
    """The expected results of an optimizer step."""

    objective: Tensor
    consistency: Tensor
    found: dict[Tokens, Found]
    gradients: dict[str, Tensor]
    """By parameter name in the model; ``extractor.weight`` and ``extractor.bias`` for the extractor."""


def step(
    model: PreTrainedModel,
    initial: PreTrainedModel,
    examples: Sequence[Example],
    layer: int,
    weight: float,
    extractor: Mapping[str, Tensor] | None,
) -> Step:
    """Return losses and gradients of ``examples`` for ``model``, with the ``initial`` model as the reference.

    ``weight`` multiplies the MLC loss, which is computed from the output of ``extractor`` for the states of ``layer``.
    """
    dtype = next(model.parameters()).dtype
    maps = {name: value.to(dtype, copy=True).requires_grad_() for name, value in (extractor or {}).items()}
    found: dict[Tokens, Found] = {}
    objective, consistency, groups = torch.zeros((), dtype=dtype), torch.zeros((), dtype=dtype), 0
    for example in examples:
        pair = example.chosen, example.rejected
        found |= {tokens: run(model, tokens, layer) for tokens in (*pair, *example.translations)}
        with torch.no_grad():
            before = [run(initial, tokens, layer).logp for tokens in pair]
        objective = objective + dpo(found[pair[0]].logp, found[pair[1]].logp, *before)
        states = [found[tokens].state for tokens in (example.chosen, *example.translations)]
        if len(states) > 1:
            groups += 1
            if maps:
                states = [maps["weight"] @ state + maps["bias"] for state in states]
            consistency = consistency + mlc(states)
    objective, consistency = objective / len(examples), consistency / groups
    (objective + weight * consistency).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    gradients |= {f"extractor.{name}": value.grad for name, value in maps.items() if value.grad is not None}
    return Step(objective.detach(), consistency.detach(), found, gradients)


class Adapter(NamedTuple):
    """Low-rank factors of one weight, whose value is that of the file plus ``scale * up @ down``.

    For a weight of E experts, the rows of ``down`` (E * r, in) are ordered by expert, and the columns of ``up`` (out, r
    * E) by rank.
    """

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool
    """Whether the weight is stored with its inputs first."""
    experts: int = 1

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The factors of each expert: (E, r, in) and (E, out, r)."""
        down = self.down.view(self.experts, -1, self.down.shape[1])
        return down, self.up.view(self.up.shape[0], -1, self.experts).permute(2, 0, 1)

    def added(self) -> Tensor:
        down, up = self._factors()
        change = self.scale * (up @ down)
        change = change.mT if self.transposed else change
        return change if self.experts > 1 else change[0]

    def gradients(self, of_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``down`` and ``up``, by the chain rule from the gradient of the weight."""
        down, up = self._factors()
        gradient = self.scale * (of_weight if self.experts > 1 else of_weight[None])
        gradient = gradient.mT if self.transposed else gradient
        of_down, of_up = up.mT @ gradient, gradient @ down.mT
        return of_down.reshape(self.down.shape), of_up.permute(1, 2, 0).reshape(self.up.shape)
