"""``torch.compile``, one decoder layer at a time.

The layers of a model are alike, so one is compiled for all of them: seconds instead of the minutes that a
whole model takes, whatever its depth. And they are compiled in place: module names, state-dict keys, hooks,
adapters and a loop over fewer layers stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch._dynamo
from torch import nn

from lightning_mlc.errors import UserError, first_line

RECOMPILE_LIMIT = 64
"""Variants of a layer that may be compiled. Torch's own limit of 8, past which it runs uncompiled, is soon
reached: with and without gradient, padding, dropout, adapters; one row and several; two kinds of attention."""


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each of ``layers`` in place, for inputs of any size. A deep copy of a layer is not compiled."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        # Batches differ in rows and length, so sizes are symbols from the first compilation on.
        layer.compile(dynamic=True)


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled layers as they were, for passes that are not worth a compilation."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def require_compiler(device: torch.device) -> None:
    """Compile a small function, so that a machine that cannot compile says so before a model is loaded.

    Raises:
        UserError: There is no working compiler: of C++ for the CPU, or what triton needs for a GPU.
    """

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x * x + 1

    try:
        torch.compile(probe)(torch.ones(8, device=device))
    except Exception as error:  # a compiler can fail in any way
        raise UserError(
            "model.compile",
            f"torch.compile does not work on this machine ({first_line(error)}); "
            "install a C++ compiler, or set model.compile to false",
        ) from error
