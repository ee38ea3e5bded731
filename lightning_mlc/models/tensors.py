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
    """Put what ``make`` gives for each parameter and buffer of ``module`` in its place.

    Parameters stay parameters, trained or not. Tensors that are one, as tied embeddings are, stay one. And
    buffers that no checkpoint has, such as rotary frequencies, are among them.
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
    """What is converted within it stays in the dtype that transformers' ``from_pretrained`` would have given it.

    That is constants, and the weights that a model keeps in float32 beside those in half precision (the routers of some
    mixtures of experts). Otherwise rotary frequencies would be rounded, and every position with them, unlike in the
    model that was loaded and the one that is exported.
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
    """What is in float32 and stays there in a model in ``half``: the owner, a name, and the tensor."""
    for model in module.modules():
        if not isinstance(model, PreTrainedModel):
            continue
        patterns = [*(model._keep_in_fp32_modules_strict or ())]
        if half == torch.float16:  # whose range some weights overflow
            patterns += model._keep_in_fp32_modules or ()
        if not patterns:
            continue
        wanted = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
        for path, owner in model.named_modules():
            for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
                if tensor.dtype == torch.float32 and wanted.search(f"{path}.{name}"):
                    yield owner, name, tensor
