"""Log-probabilities of tokens from hidden states, with one chunk of logits in memory at a time.

Logits are the largest tensor of a step: for 2,000 response tokens and a vocabulary of 150,000 they take 1.2 GB in
float32, and autograd keeps two or three tensors of this size. Here they are computed for response tokens only, one
chunk of tokens after the other, and computed again in the backward pass instead of being kept.

Models differ in how they turn hidden states into logits (soft-capping, scaling, a bias, adapters on ``lm_head``).
Therefore :func:`head_of` is the model's own forward pass without the decoder. Before it is used, it is compared once
with the whole model (:mod:`lightning_mlc.models.self_check`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 2**26
"""Largest number of logits in a chunk: 256 MiB in float32, or 441 tokens for a vocabulary of 152,000. A product of this
size keeps a GPU busy."""


class _DecoderOutput:
    """The output of a decoder that has hidden states only; every other attribute is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _NoDecoder(nn.Module):
    """Replaces a decoder: returns its input embeddings as the hidden states of the last layer."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._replaced = (decoder,)  # in a tuple, so that it is not registered as a child

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of their decoder.
        return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, *_arguments: Any, inputs_embeds: Tensor, **_keywords: Any) -> _DecoderOutput:
        return _DecoderOutput(inputs_embeds)


def head_of(model: PreTrainedModel, decoder: str) -> PreTrainedModel:
    """Return the part of a model that turns hidden states into logits.

    It is a shallow copy of the model with the same parameters and without the decoder. Make a new one for each pass,
    because adapters may have been turned on or off in between.

    Args:
        model: A causal LM.
        decoder: Name of the module that turns tokens into hidden states.

    Returns:
        A model that turns ``inputs_embeds`` (1, M, H), the decoder's hidden states, into logits (1, M, V).
    """
    head: PreTrainedModel = _without(model, decoder.split("."))
    return head


def _without(module: Any, path: list[str]) -> Any:
    if not path:
        return _NoDecoder(module)
    copied = copy.copy(module)
    copied._modules = {**module._modules, path[0]: _without(module._modules[path[0]], path[1:])}
    return copied


def token_logps(
    model: PreTrainedModel, decoder: str | None, hidden: Tensor, labels: Tensor, chunk_elements: int
) -> Tensor:
    """Compute the log-probability of each of M tokens.

    If more than one chunk is needed, the backward pass computes each chunk again: a third product with ``lm_head`` in
    addition to the two of its gradients.

    Args:
        model: A causal LM.
        decoder: Name of its decoder, from :func:`~lightning_mlc.models.parts.find_decoder`.
        hidden: (M, H): last hidden states at the positions that predict the tokens.
        labels: (M,) int64: the tokens.
        chunk_elements: Largest number of logits in memory, such as `CHUNK_ELEMENTS`. A chunk has at least one token.

    Returns:
        (M,) float32; float64 if the logits are float64.
    """
    assert decoder is not None, "without a decoder no shortcut is on"
    head = head_of(model, decoder)
    size = max(1, chunk_elements // int(model.config.get_text_config().vocab_size))
    if len(labels) <= size:
        # A single chunk fits in memory, so keep it and compute it only once.
        return _chunk_logps(head, hidden, labels)
    chunks = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    parts = [checkpoint(_chunk_logps, head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts)


def next_logits(model: PreTrainedModel, decoder: str | None, hidden: Tensor) -> Tensor:
    """Compute the logits of the next token at a few positions. All of them are in memory at once.

    Args:
        model: A causal LM.
        decoder: Name of its decoder.
        hidden: (P, H): last hidden states.

    Returns:
        (P, V), in the precision of the forward pass.
    """
    assert decoder is not None, "without a decoder no shortcut is on"
    return _logits(head_of(model, decoder), hidden)


def _chunk_logps(head: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    return logps_of(_logits(head, hidden), labels)


def _logits(head: PreTrainedModel, hidden: Tensor) -> Tensor:
    device = hidden.device.type
    with torch.autocast(
        device,
        enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
        # If chunks shared a cached cast of the weight, their gradients would be summed in low precision.
        cache_enabled=False,
    ):
        logits: Tensor = head(inputs_embeds=hidden[None], use_cache=False).logits[0]
    return logits


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the log-softmax of logits at given tokens, in float32 (float64 for float64 logits).

    Args:
        logits: (M, V) floating point.
        labels: (M,) int64.

    Returns:
        (M,) log-probabilities.
    """
    found: Tensor = _LogSoftmaxAt.apply(logits, labels)  # type: ignore[no-untyped-call]
    return found


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _LogSoftmaxAt(torch.autograd.Function):
    """Log-softmax that keeps the logits in their own precision.

    Its backward pass makes one copy in float32, where autograd would make three.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = _wide(logits)
        normalizer = wide.logsumexp(1)
        ctx.save_for_backward(logits, labels, normalizer)
        return wide.gather(1, labels[:, None]).squeeze(1) - normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, normalizer = ctx.saved_tensors
        gradient = (_wide(logits) - normalizer[:, None]).exp_()
        gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
        return gradient.mul_(-grad[:, None]).to(logits.dtype), None
