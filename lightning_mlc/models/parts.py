"""Find the parts of a causal LM that the training step runs separately: the decoder and its layers.

Names and attributes are not reliable: OPT's LM calls the decoder inside its base model, Llama 4's text model names a
base model that it does not have, and a multimodal model has a second stack of layers.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from lightning_mlc.models.layers import num_layers

LAYER_NAMES = ("layers", "h", "blocks", "block", "layer")
"""Usual names of the list of layers. Some models have other lists of the same length."""


class _Called(Exception):
    """Stops a model when it calls its first module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def find_decoder(model: PreTrainedModel) -> str | None:
    """Find the decoder: the module that turns tokens into hidden states, which the model calls first.

    The model is called, but stopped at that call. Nothing is computed, so the model may be on the ``meta`` device.

    Args:
        model: A causal LM.

    Returns:
        Name of the module. None: the first module that the model calls does not contain its layers.
    """

    def stop(module: nn.Module, _inputs: Any) -> None:
        if module is not model:
            raise _Called(module)

    handle = register_module_forward_pre_hook(stop)
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    except _Called as called:
        first = called.module
    except Exception:  # the model's own code may need more than tokens
        return None
    else:
        return None
    finally:
        handle.remove()
    name = next((name for name, module in model.named_modules() if module is first), None)
    return name if name and _find_layers(first, num_layers(model.config)) else None


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module with the dotted ``name``, such as ``model.decoder``, inside ``model``."""
    return functools.reduce(getattr, name.split("."), model)


def text_part(decoder: nn.Module) -> nn.Module:
    """Return the part of ``decoder`` that processes text: all of it, unless it is multimodal."""
    whole: Any = decoder
    found: Any = whole.get_decoder() if isinstance(decoder, PreTrainedModel) else decoder
    return found if any(module is found for module in decoder.modules()) else decoder


def find_layers(decoder: nn.Module, depth: int) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Find the list of a decoder's layers.

    Args:
        decoder: The decoder.
        depth: Number of its layers.

    Returns:
        The module that owns the list, the list's name in it, and the list. None: there is no such list.
    """
    return _find_layers(text_part(decoder), depth) or _find_layers(decoder, depth)


def _find_layers(part: nn.Module, depth: int) -> tuple[nn.Module, str, nn.ModuleList] | None:
    found = [
        (owner, name, module)
        for owner in part.modules()
        for name, module in owner.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    usual = (place for place in found if place[1] in LAYER_NAMES)
    return next(usual, found[0] if found else None)


def beyond_text(model: PreTrainedModel) -> list[str]:
    """Return the names of the outermost modules with parameters that text does not use, such as a vision tower."""
    name = find_decoder(model)
    if name is None:
        return []
    decoder = submodule(model, name)
    part = text_part(decoder)
    if part is decoder:
        return []
    embeddings = model.get_input_embeddings()
    inside = {id(p) for module in (part, embeddings) if module is not None for p in module.parameters()}
    found: list[str] = []
    for path, module in decoder.named_modules():
        own = [id(parameter) for parameter in module.parameters()]
        if path and own and not inside & set(own) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return [f"{name}.{path}" for path in found]


def token_embeddings(model: PreTrainedModel) -> int | None:
    """Return the number of token embeddings. None: the model has no table of them."""
    table: Any = model.get_input_embeddings()
    return operator.index(table.weight.shape[0]) if hasattr(table, "weight") else None


def learnt_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions in a model's table of positions. None: it has no table and computes positions."""
    sizes = []
    elsewhere = tuple(f"{name}." for name in beyond_text(model))  # positions in an image, for example
    for name, module in model.named_modules():
        if f"{name}.".startswith(elsewhere):
            continue
        own: Any = module
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe"):
            sizes.append(module.num_embeddings - int(getattr(own, "offset", 0)))
        table = getattr(own, "embed_positions", getattr(own, "pos_encoding", None))  # GPT-J, CTRL
        if isinstance(table, torch.Tensor) and table.ndim == 2:
            sizes.append(table.shape[0])
        if hasattr(own, "build_mpt_alibi_tensor"):  # MPT computes a table of fixed size
            sizes.append(int(own.config.max_seq_len))
    return min(sizes, default=None)
