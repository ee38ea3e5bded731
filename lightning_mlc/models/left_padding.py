"""Whether a model generates the same from a prompt alone and from one in a batch, where padding stands on its left.

Recurrent models may see the padding. Transformers hides it from Mamba and its relatives, and not from RWKV and
RecurrentGemma; RWKV in a batch is wrong even without any, and attention in which a whole row is masked may be NaN. So
each model is tried before it first generates from a batch, and prompts of one that fails are run one at a time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_mlc.data.rows import NO_RESPONSE, Row, TokenRows
from lightning_mlc.models.trials import difference, tolerance_of, trial_tokens

logger = logging.getLogger("lightning_mlc")

SEES_PADDING = frozenset({"rwkv", "recurrent_gemma"})
"""Types of models known to: the trial of an untrained one, or one in half precision, may not show it."""
LENGTHS = (9, 4, 9)
"""Tokens of the prompts that are tried."""
NEW_TOKENS = 3

Logits = Callable[[Tensor, Tensor, int], Tensor]
"""From prompts (N, T), their mask (N, T) and a number S of new tokens to the logits (N, S, V) those were chosen by."""

_KNOWN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def batches_agree(model: PreTrainedModel, logits: Logits) -> bool:
    """Whether ``model`` generates the same from a batch as from each prompt alone. It is tried once.

    Args:
        model: A model with its weights, where it is run.
        logits: Generates with it.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _agree(model, logits)
        if not _KNOWN[model]:
            logger.warning(
                "%s gives other results in a batch than alone (padding on the left): it generates from one prompt at "
                "a time",
                type(model).__name__,
            )
    return _KNOWN[model]


@torch.no_grad()  # weights that processes share could not be gathered anew after inference mode
def _agree(model: PreTrainedModel, logits: Logits) -> bool:
    if model.config.get_text_config().model_type in SEES_PADDING:
        return False
    tokens = trial_tokens(model.config)
    prompts = [tuple(itertools.islice(tokens, length)) for length in LENGTHS]

    def run(*some: Sequence[int]) -> Tensor:
        rows = TokenRows.pad([Row(prompt, (), 0, 0, NO_RESPONSE) for prompt in some], 0, "left").to(model.device)
        return logits(rows.input_ids, rows.attention_mask, NEW_TOKENS)

    alone = [run(prompt)[0] for prompt in prompts]
    try:
        together = run(*prompts)
    except Exception:  # foreign code, which may stumble over a mask
        return False
    return all(_same(found, expected, tolerance_of(model)) for found, expected in zip(together, alone, strict=True))


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits (S, V) agree, up to where a tie of two tokens leads them apart."""
    for one, other in zip(found, expected, strict=True):
        if difference(one, other) > tolerance:
            return False
        if one.argmax() != other.argmax():
            break
    return True
