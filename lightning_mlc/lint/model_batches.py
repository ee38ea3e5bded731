"""How the models of checks are given texts: limits, batches by tokens, and lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.generation import plan_batches
from lightning_mlc.sources import ModelSource

MOST_TOKENS = 512
"""Tokens of an input that are read, unless the model says less. The beginning of a prompt tells what it is about."""
BATCH_TOKENS = 8192
"""Tokens of a batch, with padding."""


def usable(text: str) -> str:
    """``text`` with a question mark for each unpaired surrogate, which cannot be tokenised."""
    return text.encode(errors="replace").decode()


def require_tokenizer_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Refuse a model whose tokenizer cannot be its own.

    transformers makes an empty tokenizer for a folder that has none, and every text would be unknown tokens.

    Raises:
        UserError: The tokenizer has less than half of the tokens that the model has. Published models have some room
            in their tables, and far less than half.
    """
    tokens, room = len(tokenizer), config.vocab_size
    if tokens < room / 2:
        raise UserError(
            "model.name_or_path",
            f"{source} lacks its tokenizer: the one that was found has {tokens} tokens, and the model {room}; "
            "add its tokenizer's files",
        )


def padded_batches(tokenizer: Any, encoded: Any, device: torch.device) -> Iterator[tuple[list[int], Any]]:
    """Divide encoded inputs into padded batches.

    Args:
        tokenizer: The tokenizer that encoded them.
        encoded: Its lists by key, such as ``input_ids``, with one list of integers for each of N inputs.
        device: Where the batches go to.

    Yields:
        The indices of B inputs, and their tensors by key, (B, T) integers.
    """
    for part in plan_batches([len(ids) for ids in encoded["input_ids"]], BATCH_TOKENS, 0):
        own = {key: [values[place] for place in part] for key, values in encoded.items()}
        # Whatever the tokenizer prefers: on the right, padding moves no token to another position.
        yield part, tokenizer.pad(own, padding_side="right", return_tensors="pt").to(device)


@contextmanager
def device_memory() -> Iterator[None]:
    """Turns an out-of-memory error of an accelerator into an error of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("device", "the model does not fit into the accelerator's memory; give --device cpu") from error
