"""The worker's end of the pipe. The worker takes one optimizer step for each request."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import memory
from benchmarks.timing import synchronize


class Step(NamedTuple):
    """An optimizer step."""

    seconds: float
    """From the request until the device has finished."""
    ids: tuple[str, ...]
    loss: float


class Counts(NamedTuple):
    """Amount of computation in an optimizer step."""

    flops: int
    """Floating-point operations of matrix products and attention, forward and backward."""
    trained: int
    """Positions, including padding, that went through the decoder with a gradient."""
    frozen: int
    """Positions, including padding, that went through it without a gradient: those of the reference."""


class Memory(NamedTuple):
    """Memory of a worker, in bytes."""

    before: int
    """In use before the first step: libraries and models."""
    peak: int
    """Peak until the last timed step."""


class Failure(NamedTuple):
    """Why a worker stopped."""

    reason: str


class Turns:
    """The worker's end of the pipe. Call `ready`, then `begin` and `end` for every step, then `rest`, then `count`."""

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self._pipe = pipe
        self._device = device
        self._before = 0
        self._start = 0.0
        self._counts: list[Counts] = []

    def ready(self) -> None:
        """Report that everything is loaded."""
        gc.collect()
        self._before = memory.in_use(self._device)
        self._pipe.send("ready")

    def begin(self) -> None:
        """Wait until a step is requested."""
        self._pipe.recv()
        self._start = time.perf_counter()

    def end(self, ids: tuple[str, ...], loss: torch.Tensor) -> None:
        """Report a step that was taken on the examples ``ids``."""
        synchronize(self._device)
        seconds = time.perf_counter() - self._start
        self._pipe.send(Step(seconds, ids, float(loss)))

    def rest(self) -> None:
        """Report memory after the last timed step, and wait until counting is requested."""
        self._pipe.send(Memory(self._before, memory.peak(self._device)))
        self._pipe.recv()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the FLOPs and positions of one step."""
        positions: Counter[tuple[int, bool]] = Counter()

        def count(module: nn.Module, inputs: Any) -> None:
            if isinstance(module, nn.Embedding):
                positions[module.num_embeddings, torch.is_grad_enabled()] += inputs[0].numel()

        handle = register_module_forward_pre_hook(count)
        try:
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
                yield
        finally:
            handle.remove()
        # The largest embedding is that of the tokens; some models have another one for positions.
        table = max((size for size, _ in positions), default=0)
        self._counts.append(Counts(flops.get_total_flops(), positions[table, True], positions[table, False]))

    def count(self) -> None:
        """Report the counts of all counted steps."""
        self._pipe.send(self._counts)


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _sdpa_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}
"""FLOPs of attention kernels that PyTorch's counter lacks. As it does for others, these count the masked half too."""
