"""A GPU for Triton that does not exist: kernels are compiled for it up to PTX and launched on the CPU.

Everything before the launch is Triton's own: turning arguments into types, constants and alignments, and compiling. So
a kernel gets exactly the arguments that the code under test passes, on CPU tensors. Memory is that of the tensors which
were passed, or whose addresses were asked for since the launch before: addresses may be passed in place of tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import ptx
import pytest
import torch
import triton  # type: ignore[import-untyped]
from triton.backends import Backend, backends  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.backends.nvidia.compiler import CUDABackend  # type: ignore[import-untyped]


class _ToPtx(CUDABackend):  # type: ignore[misc]
    """Triton's compiler, but stopping before ptxas."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        """Part of the key of Triton's cache, so that a real device never finds these entries, which have only PTX."""
        return f"to-ptx-{self.target.arch}"


class EmulatedGpu:
    """The driver that Triton talks to, and a record of the launches.

    Attributes:
        races: Descriptions of the races in all launches.
        launches: Names of the kernels that ran, in order.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.races: set[str] = set()
        self.launches: list[str] = []
        self.utils = self
        self._addressed: list[torch.Tensor] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this Triton's device until the test ends."""
        self.races.clear()
        self.launches.clear()
        self._addressed.clear()
        nvidia = backends["nvidia"]
        monkeypatch.setitem(backends, "nvidia", Backend(compiler=_ToPtx, driver=nvidia.driver))
        monkeypatch.setattr(triton.runtime.driver, "_active", self)
        data_ptr = torch.Tensor.data_ptr

        def noted(tensor: torch.Tensor) -> int:
            self._addressed.append(tensor)
            return data_ptr(tensor)

        monkeypatch.setattr(torch.Tensor, "data_ptr", noted)

    # Methods that Triton calls

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, ptx.LANES)

    def get_current_device(self) -> EmulatedGpu:
        """Triton looks up compiled kernels by this. No other device equals it."""
        return self

    def get_current_stream(self, device: EmulatedGpu) -> int:
        return 0

    def get_device_properties(self, device: EmulatedGpu) -> dict[str, int]:
        return {"max_shared_mem": 48 * 1024}

    def load_binary(self, name: str, code: bytes, shared: int, device: EmulatedGpu) -> tuple[Any, ...]:
        """Module, function, registers, spilled registers, largest number of threads in a block."""
        return self, ptx.Program(code.decode(), shared), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = list(source.signature.values())
        threads = metadata.num_warps * ptx.LANES

        def launch(x: int, y: int, z: int, stream: int, program: ptx.Program, *rest: Any) -> None:
            handed = rest[-len(kinds) :]  # the arguments before these are metadata and hooks
            arguments = [value for value, kind in zip(handed, kinds, strict=True) if kind != "constexpr"]
            bits = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
            memory = ptx.Memory(dict(map(_bytes, self._addressed)))
            self._addressed.clear()
            self.launches.append(program.name)
            self.races |= program.run((x, y, z), threads, bits, memory)

        return launch


def _bytes(tensor: torch.Tensor) -> tuple[int, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Address of the tensor's storage, and the storage itself, so that a kernel's writes reach the tensor."""
    storage = tensor.untyped_storage()
    kind = ctypes.c_uint8 * storage.nbytes()
    if storage.nbytes() == 0:
        return 0, np.empty(0, np.uint8)
    return storage.data_ptr(), np.ctypeslib.as_array(kind.from_address(storage.data_ptr()))
