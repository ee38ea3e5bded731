"""Launch a kernel again without the work of the first time.

Triton's launcher binds, types and hashes every argument of every call, which takes longer than the launch. But a
training loop calls with the same layout again and again: only the addresses differ. So the first launch of a layout
goes through Triton, which returns the compiled kernel. A :class:`_Plan` keeps it with all arguments but the addresses,
and the following launches hand it to the driver.

A plan must never differ from what Triton would do. Therefore:

- A :class:`Call` is a function of the layout alone, and the layout and the device are the plan's key.
- Triton compiles another variant for an address that is no multiple of 16. Such a launch goes through Triton.
- So does every launch while Triton's hooks, its debug mode or its instrumentation are on.
- Versions of Triton that are not known, and its interpreter, have no plans.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

MOST_PLANS = 256
"""When so many are kept, all are dropped, because batches of ever new sizes must not fill the memory."""
DIRECT = (3, 6), (3, 9)
"""First and last version of Triton in which ``CompiledKernel.run`` takes what :func:`_directly` hands over."""

_LOG = logging.getLogger("mlc_kernels")
_VERSION: str = triton.__version__


class Call(NamedTuple):
    """All of a launch but its tensors. A kernel's parameters are in this order: tensors, numbers, constants."""

    kernel: Any
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    """Compile-time constants by name, in the order of the parameters."""
    options: dict[str, int]
    """Options of the compiler."""


class _Plan(NamedTuple):
    kernel: Any
    compiled: Any
    """Held, so that the code stays loaded."""
    run: Callable[[int, list[int]], object]
    """Takes a stream and the tensors' addresses."""


Bind = Callable[[Any, Call], Callable[[int, list[int]], object]]

_plans: dict[tuple[Any, ...], _Plan] = {}
_lock = threading.Lock()


def launch(prepare: Callable[..., Call], layout: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
    """Launch the kernel of ``prepare(*layout)`` on the device of the first tensor, in its current stream.

    Args:
        prepare: A function without state, so that equal layouts mean equal calls.
        layout: Its arguments: all sizes, strides, types and options, hashable. It determines ``tensors`` but for their
            addresses.
        tensors: The kernel's first arguments. For Triton's interpreter they may be on a CPU.
    """
    bind = _bind
    if bind is None:
        with _on_device_of(tensors[0]):
            _launch_by_triton(prepare(*layout), tensors)
        return
    active = triton.runtime.driver.active
    device = active.get_current_device()
    first = tensors[0]
    if first.is_cuda and first.get_device() != device:
        with torch.cuda.device(first.device):
            launch(prepare, layout, tensors)
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    together = 0
    for address in addresses:
        together |= address
    aligned = together % 16 == 0
    key = device, prepare, layout
    plan = _plans.get(key)
    if plan is not None and aligned and _undisturbed(plan.kernel):
        try:
            plan.run(active.get_current_stream(device), addresses)
            return
        except TypeError as error:  # the launcher refuses its arguments before it launches
            _stop_planning(error)
    call = prepare(*layout)
    # Ask before the launch, because this decides which variant Triton compiles.
    usual = aligned and _undisturbed(call.kernel)
    compiled = _launch_by_triton(call, tensors)
    # If Triton compiles in the background, the result is no kernel yet.
    if plan is None and usual and isinstance(compiled, triton.compiler.CompiledKernel):
        _keep(key, _Plan(call.kernel, compiled, bind(compiled, call)))


def forget() -> None:
    """Drop all plans."""
    with _lock:
        _plans.clear()


def _launch_by_triton(call: Call, tensors: Sequence[Tensor]) -> object:
    return call.kernel[call.grid](*tensors, *call.numbers, **call.constants, **call.options)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _keep(key: tuple[Any, ...], plan: _Plan) -> None:
    with _lock:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan


def _undisturbed(kernel: Any) -> bool:
    """Whether nothing asks Triton to do more than to launch: no hook, no debug mode, no instrumentation."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (
        # A chain of hooks is always there. Only its list tells whether it has any.
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or triton.knobs.compilation.instrumentation_mode
        or getattr(kernel, "pre_run_hooks", None)
    )


def _directly(compiled: Any, call: Call) -> Callable[[int, list[int]], object]:
    """Hand over what Triton hands to its launcher, without hooks."""
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = call.grid
    rest = (*call.numbers, *call.constants.values())
    return lambda stream, addresses: run(x, y, z, stream, function, packed, None, None, None, *addresses, *rest)


def _publicly(compiled: Any, call: Call) -> Callable[[int, list[int]], object]:
    """Launch a compiled kernel as Triton's tutorials do."""
    run = compiled[call.grid]
    rest = (*call.numbers, *call.constants.values())
    return lambda stream, addresses: run(*addresses, *rest)  # it asks for the current stream itself


def _bind_for(version: str) -> Bind | None:
    """How to launch by a plan with a version of Triton; None if all launches go through Triton."""
    number = re.match(r"(\d+)\.(\d+)", version)
    try:
        interpreted = triton.knobs.runtime.interpret
        _undisturbed(None)
        launchable = hasattr(triton.compiler.CompiledKernel, "__getitem__")
    except AttributeError:  # a version that lacks something to ask for
        return None
    if number is None or interpreted or not launchable:
        return None
    return _directly if DIRECT[0] <= (int(number[1]), int(number[2])) <= DIRECT[1] else _publicly


def _stop_planning(error: TypeError) -> None:
    global _bind
    _LOG.warning("Launches take longer, because Triton %s refuses a kernel's arguments: %s", _VERSION, error)
    _bind = None
    forget()


_bind = _bind_for(_VERSION)
