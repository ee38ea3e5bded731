"""A GPU for Triton that does nothing, so that the host's part of a launch can be seen without a GPU.

Triton binds, types and hashes arguments as always, parses the kernel, and calls a launcher. Stubbed are the compiler
behind the parser, the driver (devices, streams and binaries are objects and numbers that mean nothing) and the launcher
in C. Tensors are on the CPU, and nothing is written to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import triton  # type: ignore[import-untyped]
from torch import Tensor
from triton.backends import Backend  # type: ignore[import-untyped]
from triton.backends import backends as triton_backends
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.backends.nvidia.compiler import CUDABackend  # type: ignore[import-untyped]

from mlc_kernels import backends, launch


class _ParserOnly(CUDABackend):  # type: ignore[misc]
    """Triton's compiler for NVIDIA, which stops after the first stage."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "stub"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        for name in [name for name in stages if name != "ttir"]:
            del stages[name]
        stages["stub"] = _as_binary

    def hash(self) -> str:
        """Part of the key of Triton's cache, so that a real device never finds these entries."""
        return f"stub-{self.target.arch}"


def _as_binary(module: Any, metadata: dict[str, Any]) -> bytes:
    text = str(module)
    name = re.search(r"tt\.func public @(\w+)", text)
    assert name is not None
    metadata |= {"name": name[1], "shared": 0}
    return text.encode()


class Launch(NamedTuple):
    """What reached the launcher."""

    kernel: str
    grid: tuple[int, int, int]
    stream: int
    function: object
    """One for each compiled variant on each device."""
    metadata: object
    arguments: tuple[Any, ...]
    """All of the kernel's, compile-time constants included; tensors as their addresses."""
    by_plan: bool
    """Whether addresses came in place of tensors."""


@dataclass(frozen=True, eq=False)
class _Function:
    """A loaded binary, equal to itself alone."""

    name: str
    device: object


@dataclass(eq=False)
class StubGpu:
    """The driver that Triton talks to.

    Attributes:
        device: The current one. Any object that is equal to itself alone, so that its kernels are nobody else's.
        stream: The current one.
        record: Where launches are noted; None for none.
        before: Called before each launch with the arguments.
    """

    device: object = field(default_factory=object)
    stream: int = 0
    record: list[Launch] | None = None
    before: Callable[[tuple[Any, ...]], object] | None = None

    @property
    def utils(self) -> StubGpu:
        return self

    @contextmanager
    def installed(self) -> Iterator[StubGpu]:
        """Make this Triton's device, and let ``backend="triton"`` take CPU tensors."""
        key, missing = ("cpu", None), object()
        real, active = triton_backends["nvidia"], triton.runtime.driver._active
        reason = backends._reasons.get(key, missing)
        triton_backends["nvidia"] = Backend(compiler=_ParserOnly, driver=real.driver)
        triton.runtime.driver._active = self
        backends._reasons[key] = None
        launch.forget()
        try:
            yield self
        finally:
            launch.forget()
            triton_backends["nvidia"] = real
            triton.runtime.driver._active = active
            if reason is missing:
                del backends._reasons[key]
            else:
                backends._reasons[key] = reason  # type: ignore[assignment]

    # Methods that Triton calls

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return self.stream

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 0}

    def load_binary(self, name: str, code: bytes, shared: int, device: object) -> tuple[Any, ...]:
        """Module, function, registers, spilled registers, largest number of threads in a block."""
        return self, _Function(name, device), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launcher(
            x: int,
            y: int,
            z: int,
            stream: int,
            function: _Function,
            packed: object,
            about: object,
            enter: Callable[[object], object] | None,
            leave: Callable[[object], object] | None,
            *arguments: Any,
        ) -> None:
            if self.before is not None:
                self.before(arguments)
            if enter is not None:
                enter(about)
            if self.record is not None:
                addresses = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
                by_plan = not isinstance(arguments[0], Tensor)
                self.record.append(Launch(function.name, (x, y, z), stream, function, packed, addresses, by_plan))
            if leave is not None:
                leave(about)

        return launcher
