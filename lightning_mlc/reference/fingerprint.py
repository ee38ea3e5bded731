"""What a model's scores depend on, so that scores of another model are never taken for them."""

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
"""Entries of a configuration that change no score, or that are described elsewhere."""


def describe_model(model: PreTrainedModel, precision: str) -> dict[str, str]:
    """What the log-probabilities of ``model`` depend on beside the tokens, by names for messages.

    Args:
        model: As it was loaded, before any adapter is added.
        precision: The Trainer's.
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
    """SHA-256 over names, dtypes, shapes and values of ``weights``, in any order.

    The tensors themselves and not a model's name: a folder can be written anew, and a name can move. It costs about
    a second for each 2 GB and thread.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of the interpreter's lock
        digests = dict(zip(weights, pool.map(_hash_of_tensor, weights.values()), strict=True))
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _hash_of_tensor(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    values = tensor.detach().cpu().contiguous().flatten()
    if len(values):
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
