"""A description of everything that a model's scores depend on, so that no scores of another model are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Keys of a configuration that change no score, or that are described separately."""


def describe_model(model: PreTrainedModel, precision: str) -> dict[str, str]:
    """Describe what the log-probabilities of ``model`` depend on, apart from the tokens.

    Args:
        model: The model as it was loaded, before adapters are added.
        precision: Precision of the Trainer, such as ``bf16-mixed``.

    Returns:
        A description or hash of each part, by a name that is used in messages.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    return {
        "weights": hash_of_weights(model.state_dict()),
        "configuration": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "precision": precision,
        "attention": str(model.config._attn_implementation),
        "adapters": "none",
        "transformers": transformers.__version__,
    }


def hash_of_weights(weights: Mapping[str, Tensor]) -> str:
    """Hash the names, dtypes, shapes and values of tensors.

    The values are hashed because a model's name proves nothing: a folder can be overwritten, and a name on the hub can
    point to new weights. This takes about a second per 2 GB and thread.

    Args:
        weights: Tensors by name. Their order does not matter.

    Returns:
        SHA-256 as hexadecimal digits.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the interpreter's lock
        digests = dict(zip(weights, pool.map(_hash_of_tensor, weights.values()), strict=True))
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _hash_of_tensor(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    values = tensor.detach().cpu().contiguous().flatten()
    if len(values):
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
