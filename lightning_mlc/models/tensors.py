"""Replace the tensors of a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


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
