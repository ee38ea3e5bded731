"""Greedy responses, the same for ``predict`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from lightning_mlc.data.rows import TokenRows


def generate_greedily(
    model: Any, rows: TokenRows, max_new_tokens: int, ends: Sequence[int], pad: int | None, together: bool = False
) -> Tensor:
    """(N, T + S) int64: the prompts ``rows`` (N, T, padded on the left) and responses of S tokens at most.

    Each token is the likeliest one. Nothing of the model's own generation configuration counts, such as the
    repetition penalty of Qwen2.5: transformers would fill in from there whatever a call leaves out.

    Args:
        model: A causal LM of transformers.
        rows: Prompts, one a row, on the model's device.
        max_new_tokens: Longest response.
        ends: Ids that end one.
        pad: Id that stands after the end of a response; None if the tokenizer has none.
        together: Whether processes meet in every pass, and so go on until the last response of any is complete.
    """
    with _without_own_settings(model):
        generated: Tensor = model.generate(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends),
            pad_token_id=pad,
            do_sample=False,
            synced_gpus=together,
        )
    return generated


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own
