"""Greedy responses, the same for ``predict`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from lightning_mlc.data.rows import TokenRows
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.left_padding import batches_agree


def generate_greedily(
    model: Any, rows: TokenRows, max_new_tokens: int, ends: Sequence[int], pad: int | None, together: bool = False
) -> Tensor:
    """(N, T + S) int64: the prompts ``rows`` (N, T, padded on the left) and responses of S tokens at most.

    Each token is the likeliest one, and the one that the prompt gets alone: where a batch gives others
    (:mod:`~lightning_mlc.models.left_padding`), prompts are run one at a time. Nothing of the model's own generation
    configuration counts, such as the repetition penalty of Qwen2.5: transformers would fill in from there whatever a
    call leaves out.

    Args:
        model: A causal LM of transformers.
        rows: Prompts, one a row, on the model's device.
        max_new_tokens: Longest response.
        ends: Ids that end one.
        pad: Id that stands after the end of a response; None if the tokenizer has none.
        together: Whether processes meet in every pass, and so go on until the last response of any is complete.

    Raises:
        UserError: The model's code cannot generate. Or the processes would have to meet in another number of passes,
            because prompts are run one at a time.
    """

    ids, mask = rows.input_ids, rows.attention_mask

    def run(ids: Tensor, mask: Tensor, new_tokens: int, ends: Sequence[int], **options: Any) -> Any:
        try:
            return model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                eos_token_id=list(ends) or None,
                pad_token_id=pad,
                do_sample=False,
                synced_gpus=together,
                **options,
            )
        except (ValueError, TypeError, AttributeError, LookupError) as error:  # foreign code
            raise UserError(
                "model.name_or_path",
                f"{type(model).__name__} can be trained and not generated from ({type(error).__name__}: "
                f"{first_line(error)}); export it, and generate with what its authors use",
            ) from error

    def logits(ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        found = run(ids, mask, new_tokens, (), output_logits=True, return_dict_in_generate=True)
        return torch.stack(found.logits, dim=1)

    with _without_own_settings(model):
        # Processes that meet in every pass try it together, whatever number of prompts each of them has.
        agree = (together or len(ids) > 1) and batches_agree(model, logits)
        if len(ids) == 1 or agree:
            generated: Tensor = run(ids, mask, max_new_tokens, ends)
            return generated
        if together:
            raise UserError(
                "trainer.strategy",
                f"{type(model).__name__} generates from one prompt at a time, which a model that is shared out over "
                "processes cannot; run predict on one device",
            )
        starts = [int(length) for length in ids.shape[1] - mask.sum(1)]
        alone = [
            run(one[None, start:], seen[None, start:], max_new_tokens, ends)
            for one, seen, start in zip(ids, mask, starts, strict=True)
        ]
    responses = [one[0, ids.shape[1] - start :] for one, start in zip(alone, starts, strict=True)]
    return torch.cat([ids, pad_sequence(responses, batch_first=True, padding_value=pad or 0)], dim=1)


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own
