"""Whether a prompt gets the same response alone and in a batch, where it is padded on the left.

Recurrent models may see the padding. Transformers hides it from Mamba and similar models, but not from RWKV and
RecurrentGemma. RWKV is wrong in a batch even without padding, and attention in which a whole row is masked may give
NaN. So each model is tried before it first generates from a batch. If it fails, prompts are run one at a time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_mlc.data.rows import NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.models.trials import difference, tolerance_of, trial_tokens

logger = logging.getLogger("lightning_mlc")

SEES_PADDING = frozenset({"rwkv", "recurrent_gemma"})
"""Types of models that are known to see padding. A trial may miss it if they are untrained or in half precision."""
LENGTHS = (9, 4, 9)
"""Numbers of tokens of the prompts in the trial."""
NEW_TOKENS = 3
"""Number of tokens that the trial generates."""

Logits = Callable[[Tensor, Tensor, int], Tensor]
"""Takes prompts (N, T), their mask (N, T) and a number S of new tokens. Returns the logits (N, S, V) of these
tokens."""

_KNOWN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def batches_agree(model: PreTrainedModel, logits: Logits) -> bool:
    """Try once whether a model generates the same from a batch as from each prompt alone. The answer is kept.

    Args:
        model: A model with its weights, on the device it runs on.
        logits: Generates with the model, and returns logits.
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


@torch.no_grad()  # not inference mode, after which sharded weights could not be gathered again
def _agree(model: PreTrainedModel, logits: Logits) -> bool:
    if model.config.get_text_config().model_type in SEES_PADDING:
        return False
    tokens = trial_tokens(model.config)
    prompts = [tuple(itertools.islice(tokens, length)) for length in LENGTHS]

    def run(*some: Sequence[int]) -> Tensor:
        rows = TokenRows.pad([TokenSequence(prompt, (), 0, 0, NO_RESPONSE) for prompt in some], 0, "left").to(
            model.device
        )
        return logits(rows.input_ids, rows.attention_mask, NEW_TOKENS)

    alone = [run(prompt)[0] for prompt in prompts]
    try:
        together = run(*prompts)
    except Exception:  # the model's own code may not support a mask
        return False
    return all(_same(found, expected, tolerance_of(model)) for found, expected in zip(together, alone, strict=True))


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits (S, V) agree. After a tie of two tokens the texts may differ, so the rest is not compared."""
    for one, other in zip(found, expected, strict=True):
        if difference(one, other) > tolerance:
            return False
        if one.argmax() != other.argmax():
            break
    return True
