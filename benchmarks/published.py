"""The authors' training step, as a baseline: the cost of DPO + MLC in a straightforward implementation.

It follows https://github.com/Yuyan-B/MLC (``src/llamafactory/train/dpo/trainer.py`` and ``data/collator.py``) in all
that determines cost and result. For each pair, the chosen and the rejected response and the prompts in all L languages
are 2 + L rows of one right-padded batch. The policy and a second, frozen model both run the whole batch, with the
hidden states of every layer and float32 logits of every row. The MLC loss is a float32 SVD of the extracted states.
Printing singular values in every step and the distributed strategy are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""Label of a token that the loss ignores."""
MULTIPLE = 8
"""Rows are padded to a multiple of this."""


@dataclass(frozen=True)
class Pair:
    """A tokenised preference pair, with its prompt in L languages."""

    id: str
    prompts: tuple[list[int], ...]
    """The prompt in the language of the responses first."""
    chosen: list[int]
    rejected: list[int]

    @property
    def pair_tokens(self) -> int:
        """Number of tokens in the two rows that a preference objective needs."""
        return 2 * len(self.prompts[0]) + len(self.chosen) + len(self.rejected)

    @property
    def translation_tokens(self) -> int:
        """Number of tokens in the prompts in the other languages."""
        return sum(map(len, self.prompts[1:]))


class PaddedBatch(NamedTuple):
    """Rows of B pairs: B chosen, B rejected, then the L prompts of the first pair, of the second pair, ..."""

    input_ids: Tensor
    """(2 B + B L, T) int64."""
    attention_mask: Tensor
    """(2 B + B L, T) int64."""
    labels: Tensor
    """(2 B + B L, T) int64: token ids of responses, `IGNORED` elsewhere."""
    pairs: int
    """B."""


class PublishedStep:
    """One optimizer step of the authors' recipe.

    Args:
        model: The policy, on its device, in training mode. The reference is a copy of its present state.
        extractor: Linear map of the hidden states.
        pad_id: Token id of padding.
        learning_rate: Learning rate of AdamW, without weight decay, for the model and the extractor.
        mixed: Whether to run the forward pass under bfloat16 autocast.
        beta: Beta of DPO.
        weight: Weight of the MLC loss.
        temperature: Temperature of the softmax over singular values.
        clip: Largest norm of the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        extractor: nn.Linear,
        pad_id: int,
        learning_rate: float,
        mixed: bool,
        beta: float,
        weight: float,
        temperature: float,
        clip: float,
    ) -> None:
        self._model = model
        self._reference = copy.deepcopy(model).requires_grad_(False).eval()
        self._extractor = extractor
        self._pad_id = pad_id
        self._mixed = mixed
        self._beta, self._weight, self._temperature, self._clip = beta, weight, temperature, clip
        self._device = next(model.parameters()).device
        self._parameters = [*model.parameters(), *extractor.parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)
        self.mean_logits: list[float] = []
        """Mean logits of the chosen and of the rejected rows in the latest step."""

    def __call__(self, pairs: Sequence[Pair]) -> Tensor:
        """Train on ``pairs`` and return the loss before the update."""
        batch = collate(pairs, self._pad_id, self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            loss = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def _loss(self, batch: PaddedBatch) -> Tensor:
        logps, logits, states = self._run(self._model, batch)
        with torch.no_grad():
            reference = self._run(self._reference, batch)[0]
        chosen, rejected = (logps - reference).chunk(2)
        # The authors log this every step, so the policy's logits stay in memory while the reference computes its own.
        self.mean_logits = [half.detach().mean().item() for half in logits.chunk(2)]
        objective = -F.logsigmoid(self._beta * (chosen - rejected)).mean()
        return objective + self._weight * self._consistency(states, batch)

    def _run(self, model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (2 B,) and logits (2 B, T, V) of the responses, last hidden states (B L, T, H)."""
        output: Any = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True
        )
        logits = output.logits.to(torch.float32)[: 2 * batch.pairs]
        labels = batch.labels[: 2 * batch.pairs, 1:]
        predicted = logits[:, :-1].log_softmax(2).gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
        return (predicted * (labels != IGNORED)).sum(1), logits, output.hidden_states[-1][2 * batch.pairs :]

    def _consistency(self, states: Tensor, batch: PaddedBatch) -> Tensor:
        last = batch.attention_mask[2 * batch.pairs :].sum(1) - 1
        prompts = states[torch.arange(len(states), device=states.device), last].view(batch.pairs, -1, states.shape[2])
        extracted = self._extractor(prompts)
        unit = extracted / (extracted.norm(dim=2, keepdim=True) + 1e-12)
        with torch.autocast(self._device.type, enabled=False):
            _, values, _ = torch.linalg.svd(unit.to(torch.float32), full_matrices=False)
            scaled = values / (values[:, :1].detach() + 1e-12) / self._temperature
            return F.cross_entropy(scaled, torch.zeros(len(scaled), dtype=torch.int64, device=scaled.device))


def collate(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> PaddedBatch:
    """Return ``pairs`` as one right-padded batch on ``device``. All pairs have prompts in the same languages."""
    rows = [(pair.prompts[0], pair.chosen) for pair in pairs]
    rows += [(pair.prompts[0], pair.rejected) for pair in pairs]
    rows += [(prompt, []) for pair in pairs for prompt in pair.prompts]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    length = -(-longest // MULTIPLE) * MULTIPLE
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[index, :end] = torch.tensor(prompt + response, dtype=torch.int64)
        mask[index, :end] = 1
        labels[index, len(prompt) : end] = ids[index, len(prompt) : end]
    return PaddedBatch(ids.to(device), mask.to(device), labels.to(device), len(pairs))
