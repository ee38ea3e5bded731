"""Log-probabilities of tokens from hidden states, with one chunk of logits alive at a time.

Logits are the largest tensor of a step: 2,000 response tokens over a vocabulary of 150,000 are 1.2 GB in
float32, and autograd keeps two or three of that size. Here they are made for response tokens only, a chunk
of tokens after the other, and made again in the backward pass instead of being kept.

What lies between a model's hidden states and its logits differs (soft-capping, scaling, a bias, adapters on
``lm_head``), so it is not rebuilt here: :func:`head_of` is the model's own forward pass with the decoder
taken out. It is compared with the whole model once, before it is relied on (:mod:`lightning_mlc.models.self_check`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 2**26
"""Logits of a chunk: 256 MiB in float32, 441 tokens of a vocabulary of 152,000. Large enough a product for a GPU."""


class _DecoderOutput:
    """Hidden states in the place of a decoder's output; whatever else one may return is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _NoDecoder(nn.Module):
    """Returns the embeddings it is given as if they were the hidden states of the last layer."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._replaced = (decoder,)  # in a tuple, so as not to become a child

    def __getattr__(self, name: str) -> Any:
        # Some models look something up in their decoder.
        return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, *_arguments: Any, inputs_embeds: Tensor, **_keywords: Any) -> _DecoderOutput:
        return _DecoderOutput(inputs_embeds)


def head_of(model: PreTrainedModel, decoder: str) -> PreTrainedModel:
    """What ``model`` does between the hidden states (1, M, H) of its ``decoder`` and its logits (1, M, V).

    A shallow copy with the same parameters and without the module called ``decoder``; call it with
    ``inputs_embeds``. It is made anew for each pass, since adapters may have come or gone in between.
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
    """Log-probability of each of M tokens, as :func:`head_of` ``model`` gives it.

    Args:
        model: A causal LM.
        decoder: Name of its decoder, as :func:`~lightning_mlc.models.parts.find_decoder` gives it.
        hidden: (M, H), last hidden states where the tokens are predicted.
        labels: (M,) int64, the tokens.
        chunk_elements: How many logits may exist at a time (but one token's at least), as `CHUNK_ELEMENTS`.

    Returns:
        (M,) float32, or float64 where the logits are. If more than one chunk is needed, the backward pass
        computes each chunk again: a third product with ``lm_head`` beside the two of its gradients.
    """
    assert decoder is not None, "no shortcut is taken before it was tried"
    head = head_of(model, decoder)
    size = max(1, chunk_elements // int(model.config.get_text_config().vocab_size))
    if len(labels) <= size:
        # A single chunk: to keep it breaks no bound and saves the work.
        return _chunk_logps(head, hidden, labels)
    chunks = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    parts = [checkpoint(_chunk_logps, head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts)


def _chunk_logps(head: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    device = hidden.device.type
    with torch.autocast(
        device,
        enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
        # With a cached cast of the weight, the chunks' gradients would be summed in its low precision.
        cache_enabled=False,
    ):
        logits = head(inputs_embeds=hidden[None], use_cache=False).logits[0]
    return logps_of(logits, labels)


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(M,) log-softmax of ``logits`` (M, V) at ``labels`` (M,), computed in float32 (float64 in, float64 out)."""
    found: Tensor = _LogSoftmaxAt.apply(logits, labels)  # type: ignore[no-untyped-call]
    return found


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _LogSoftmaxAt(torch.autograd.Function):
    """Keeps the logits in their own precision; one wide copy in the backward pass, where autograd makes three."""

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
