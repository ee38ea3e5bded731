"""Replace and convert the tensors of a module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)


def replace_tensors(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of a module.

    Parameters stay parameters and keep ``requires_grad``. Tensors that are shared, such as tied embeddings, stay
    shared. Buffers that no checkpoint contains, such as rotary frequencies, are replaced too.

    Args:
        module: The module, which is changed in place.
        make: Returns the new tensor for an old one.
    """
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


@contextmanager
def precision_kept(module: nn.Module) -> Iterator[None]:
    """Keep some dtypes when a module is converted inside the context: those that ``from_pretrained`` would keep.

    These are the dtypes of constants, and of weights that a model keeps in float32 when the others are in half
    precision (the routers of some mixtures of experts). Otherwise rotary frequencies, and so all positions, would be
    rounded, unlike in the model that was loaded and in the one that is exported.

    Args:
        module: The module.
    """
    buffers = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name in owner._non_persistent_buffers_set
    ]
    kept = [(half, owner, name, tensor.data) for half in HALF for owner, name, tensor in _kept_in_float32(module, half)]
    yield
    for owner, name, before in buffers:
        after = getattr(owner, name)
        if after.dtype != before.dtype:
            setattr(owner, name, before.to(after.device))
    for half, owner, name, data in kept:
        after = getattr(owner, name)
        if after.dtype == half:
            after.data = data.to(after.device)


def _kept_in_float32(module: nn.Module, half: torch.dtype) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Find the tensors that stay in float32 when a model is in ``half``: their owners, names and values."""
    for model in module.modules():
        if not isinstance(model, PreTrainedModel):
            continue
        patterns = [*(model._keep_in_fp32_modules_strict or ())]
        if half == torch.float16:  # some weights exceed its range
            patterns += model._keep_in_fp32_modules or ()
        if not patterns:
            continue
        wanted = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
        for path, owner in model.named_modules():
            for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
                if tensor.dtype == torch.float32 and wanted.search(f"{path}.{name}"):
                    yield owner, name, tensor
