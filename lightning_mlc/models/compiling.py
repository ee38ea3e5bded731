"""``torch.compile``, one decoder layer at a time.

The layers of a model are alike, so that compiling one serves all. This takes seconds at any depth; a whole model takes
minutes. Layers are compiled in place, which changes no module names, state-dict keys, hooks or adapters, and still
allows a pass to run fewer layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch._dynamo
from torch import nn

from lightning_mlc.errors import UserError, first_line

RECOMPILE_LIMIT = 64
"""Largest number of compiled variants of a layer. Above its limit torch runs uncompiled, and its default of 8 is soon
reached: with and without gradient, padding, dropout, adapters; one row and several; two kinds of attention."""


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each of ``layers`` in place, for inputs of any size. Deep copies of a layer are not compiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        # Batches differ in their numbers of rows and tokens, so no size is a constant.
        layer.compile(dynamic=True)


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled layers without compilation inside the context, for passes that are not worth it."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def require_compiler(device: torch.device) -> None:
    """Compile a small function, to find out before a model is loaded whether the machine can compile.

    Args:
        device: The device that the model will run on.

    Raises:
        UserError: No working compiler exists: a C++ compiler for the CPU, or the one that triton needs for a GPU.
    """

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x * x + 1

    try:
        torch.compile(probe)(torch.ones(8, device=device))
    except Exception as error:  # compilers raise errors of many types
        raise UserError(
            "model.compile",
            f"torch.compile does not work on this machine ({first_line(error)}); "
            "install a C++ compiler, or set model.compile to false",
        ) from error
