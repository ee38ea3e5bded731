"""What models are tried on, and how far the results of two ways to run one may differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far results may differ, as a share of their size. Sums in another order round differently, a few units in the
last place of each layer. Float32 has 2 ** -24, and 75 families differed by 4e-6 at most; parts of models compute in
it under float64 too. Half precision has 2 ** -11 and 2 ** -8. A token that sees what it should not, or not what it
should, changes results by a tenth of their size and more in a trained model."""
QUANTISED = 8e-2
"""The same with quantised weights, whose products are in half precision, and in 8 bits depend on the other rows."""


def tolerance_of(model: PreTrainedModel) -> float:
    """How far results of ``model`` may differ, as a share of their size."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    smallest = model.dtype if model.dtype in TOLERANCES else dtype
    found = max(TOLERANCES.get(smallest, QUANTISED), TOLERANCES.get(dtype, QUANTISED))
    return max(found, QUANTISED) if getattr(model, "is_quantized", False) else found


def trial_tokens(config: PreTrainedConfig) -> Iterator[int]:
    """Ids of usable tokens, without end, of a model with ``config``."""
    named = {**config.to_dict(), **config.get_text_config().to_dict()}  # placeholders of images, say
    special = {id for key, id in named.items() if "_token_i" in key and isinstance(id, int)}
    size = int(config.get_text_config().vocab_size)
    usable = [i for i in range(size) if i not in special and i < size - 2] or list(range(size))
    # Neighbours in the text are no neighbours in the vocabulary, and no prompt begins like another.
    return (usable[(7 + 31 * i) % len(usable)] for i in itertools.count())


def difference(found: Tensor, expected: Tensor) -> float:
    """How far ``found`` is from ``expected``, both of any one shape, as a share of its size; infinity for NaN."""
    share = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6))
    return share if share == share else float("inf")
