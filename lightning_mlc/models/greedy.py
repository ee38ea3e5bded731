"""Greedy generation, used by both ``predict`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from lightning_mlc.data.rows import TokenRows
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.left_padding import batches_agree
from lightning_mlc.models.parts import learnt_positions


def generate_greedily(
    model: Any, rows: TokenRows, max_new_tokens: int, ends: Sequence[int], pad: int | None, together: bool = False
) -> Tensor:
    """Generate the most likely token at each position.

    A prompt gets the same response in a batch as alone: if padding or batching changes the model's results
    (:mod:`~lightning_mlc.models.left_padding`), prompts are run one at a time. The model's own generation
    configuration, such as the repetition penalty of Qwen2.5, is ignored.

    Args:
        model: A causal LM of transformers.
        rows: N prompts, one per row, padded on the left to T tokens, on the model's device.
        max_new_tokens: Largest number of tokens of a response.
        ends: Token ids that end a response.
        pad: Token id that fills up after the end of a response. None: the tokenizer has none.
        together: Whether the model is sharded, so that all processes run every pass together until the last response
            of any process is complete.

    Returns:
        (N, T + S) int64: prompts and responses, where S is the length of the longest response.

    Raises:
        UserError: The model's code cannot generate; it has too few positions; or prompts would have to be run one at a
            time while ``together``.
    """
    generate = _Generate(model, pad, together)
    ids, mask = rows.input_ids, rows.attention_mask
    _require_positions(model, int(mask.sum(1).max()), max_new_tokens)
    with _empty_generation_config(model):
        # Sharded processes run the trial together, even those with a single prompt.
        agree = (together or len(ids) > 1) and batches_agree(model, generate.logits)
        if len(ids) == 1 or agree:
            generated: Tensor = generate(ids, mask, max_new_tokens, ends)
            return generated
        if together:
            raise UserError(
                "trainer.strategy",
                f"{type(model).__name__} generates from one prompt at a time, which a model that is sharded over "
                "processes cannot do; run predict on one device, and leave model.declined out",
            )
        starts = [int(length) for length in ids.shape[1] - mask.sum(1)]
        alone = [
            generate(one[None, start:], seen[None, start:], max_new_tokens, ends)
            for one, seen, start in zip(ids, mask, starts, strict=True)
        ]
    responses = [one[0, ids.shape[1] - start :] for one, start in zip(alone, starts, strict=True)]
    return torch.cat([ids, pad_sequence(responses, batch_first=True, padding_value=pad or 0)], dim=1)


def _require_positions(model: Any, prompt: int, new_tokens: int) -> None:
    places = learnt_positions(model)
    if places is not None and prompt + new_tokens > places:
        raise UserError(
            "max_new_tokens",
            f"a prompt of {prompt} tokens and a response of {new_tokens} exceed the {places} positions that "
            f"{type(model).__name__} has learnt; lower max_new_tokens, or data.max_prompt_length",
        )


class _Generate(NamedTuple):
    """Greedy generation with fixed settings."""

    model: Any
    pad: int | None
    together: bool

    def __call__(self, ids: Tensor, mask: Tensor, new_tokens: int, ends: Sequence[int], **options: Any) -> Any:
        """Generate from prompts ``ids`` (N, T) with ``mask`` (N, T)."""
        try:
            return self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                eos_token_id=list(ends) or None,
                pad_token_id=self.pad,
                do_sample=False,
                synced_gpus=self.together,
                **options,
            )
        except (ValueError, TypeError, AttributeError, LookupError) as error:  # the model's own code
            raise UserError(
                "model.name_or_path",
                f"{type(self.model).__name__} can be trained and not generated from ({type(error).__name__}: "
                f"{first_line(error)}); export it, and generate with the software of its authors; leave model.declined "
                "out",
            ) from error

    def logits(self, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        """Return the logits (N, S, V) that S = ``new_tokens`` tokens were chosen by."""
        found = self(ids, mask, new_tokens, (), output_logits=True, return_dict_in_generate=True)
        return torch.stack(found.logits, dim=1)


@contextmanager
def _empty_generation_config(model: Any) -> Iterator[None]:
    """Remove the model's own settings: transformers use them for every argument that a call leaves out."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own
