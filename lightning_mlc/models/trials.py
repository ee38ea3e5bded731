"""Inputs on which two ways to run a model are compared, and how far the results may differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_mlc.data.rows import CHOSEN, REJECTED, TokenSequence

LONGEST_TRIAL = 8192
"""Limit of a trial's length in tokens. Rows that could exceed a window of this length or more are not packed."""
WINDOW_NAMES = ("window", "chunk", "block_size", "local_att", "floor_scale")
"""Parts of the names of configuration keys that limit how far tokens see, or after how many tokens something
changes."""
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest allowed difference of results, as a share of their size.

Sums in another order round differently, by a few units in the last place in each layer. A unit is 2 ** -24 in float32,
2 ** -11 in float16 and 2 ** -8 in bfloat16. In float32, 75 families differed by at most 4e-6; parts of float64 models
compute in float32 too. In a trained model, a token that sees a wrong token, or misses one, changes results by a tenth
of their size or more.
"""
QUANTISED = 8e-2
"""The same for quantised weights. Their products are in half precision and, in 8 bits, depend on the other rows."""


def tolerance_of(model: PreTrainedModel) -> float:
    """Return how far the results of ``model`` may differ, as a share of their size."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    smallest = model.dtype if model.dtype in TOLERANCES else dtype
    dtypes = [smallest, dtype]
    # Under autocast, products are in half precision. Whether they depend on the shape of a batch differs between CPUs.
    if torch.is_autocast_enabled(model.device.type):
        dtypes.append(torch.get_autocast_dtype(model.device.type))
    found = max(TOLERANCES.get(each, QUANTISED) for each in dtypes)
    return max(found, QUANTISED) if getattr(model, "is_quantized", False) else found


def trial_tokens(config: PreTrainedConfig) -> Iterator[int]:
    """Generate ids of ordinary tokens of a model with ``config``, without end."""
    named = {**config.to_dict(), **config.get_text_config().to_dict()}  # includes placeholders of images, for example
    special = {id for key, id in named.items() if "_token_i" in key and isinstance(id, int)}
    size = int(config.get_text_config().vocab_size)
    usable = [i for i in range(size) if i not in special and i < size - 2] or list(range(size))
    # Neighbours in the text are not neighbours in the vocabulary, and no two prompts have the same beginning.
    return (usable[(7 + 31 * i) % len(usable)] for i in itertools.count())


def windows(config: PreTrainedConfig) -> list[int]:
    """Find the lengths of windows, chunks and the like in a configuration.

    Args:
        config: Configuration of a model.

    Returns:
        Numbers of tokens, ascending, each once.
    """

    def numbers(value: Any, named: bool) -> Iterator[int]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from numbers(inner, named or any(name in str(key) for name in WINDOW_NAMES))
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from numbers(inner, named)
        elif named and isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield value

    return sorted(set(numbers(config.get_text_config().to_dict(), named=False)))


def trial_length(config: PreTrainedConfig, longest: int | None) -> int:
    """Return a number of tokens that the longest sequence of a trial must exceed.

    A window or chunk changes nothing if all tokens of a row are in it. So the trial must exceed only those that are
    shorter than the longest row of the run. Then it costs less than one step on such rows.

    Args:
        config: Configuration of the model.
        longest: Largest number of tokens in a row of the run. None: unknown.
    """
    bound = LONGEST_TRIAL if longest is None else min(longest, LONGEST_TRIAL)
    return max((window for window in windows(config) if window < bound), default=0)


def trial_rows(config: PreTrainedConfig, exceed: int) -> list[TokenSequence]:
    """Make the sequences of a trial: three prompts of different lengths, the first one with two responses.

    Args:
        config: Configuration of the model.
        exceed: The longest sequence has more tokens than this.
    """
    tokens = trial_tokens(config)

    def take(count: int) -> tuple[int, ...]:
        return tuple(itertools.islice(tokens, count))

    # The first two sequences are together as long as the last two, and the first prompt is as long as the others
    # together. So packed rows make one block without padding. Fewer passes read the weights less often, which is what
    # takes time.
    first = take(5)
    return [
        TokenSequence(first, take(max(5, exceed)), 0, 0, CHOSEN),
        TokenSequence(first, take(3), 0, 0, REJECTED, leads=False),
        TokenSequence(take(3), take(4), 1, 0, CHOSEN),
        TokenSequence(take(2), take(4), 1, 1, CHOSEN),
    ]


def difference(found: Tensor, expected: Tensor) -> float:
    """Compute the difference of two tensors of the same shape.

    Args:
        found: The tensor to check.
        expected: The expected tensor.

    Returns:
        The norm of the difference as a share of the norm of ``expected``; infinity if it is NaN.
    """
    share = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6))
    return share if share == share else float("inf")
