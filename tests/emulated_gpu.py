"""A GPU that is not there, to Triton: kernels are compiled for it up to PTX, and launched on the CPU.

Everything before the launch is Triton's own: how arguments become types, constants and alignments, and the
compilation. So kernels run with what the code under test hands over, on CPU tensors.
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
    """Triton's compiler, which stops before ptxas."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        """Part of the key of Triton's cache, where a real device would look for more than PTX."""
        return f"to-ptx-{self.target.arch}"


class EmulatedGpu:
    """What Triton asks of a driver, and what it finds out.

    Attributes:
        races: Those of all launches, in words.
        launches: Names of the kernels that ran, in order.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.races: set[str] = set()
        self.launches: list[str] = []
        self.utils = self

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it Triton's device, until the test is over."""
        self.races.clear()
        self.launches.clear()
        nvidia = backends["nvidia"]
        monkeypatch.setitem(backends, "nvidia", Backend(compiler=_ToPtx, driver=nvidia.driver))
        monkeypatch.setattr(triton.runtime.driver, "_active", self)

    # Questions of Triton

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, ptx.LANES)

    def get_current_device(self) -> EmulatedGpu:
        """Triton keeps what it compiled by this; nobody else's device is equal."""
        return self

    def get_current_stream(self, device: EmulatedGpu) -> int:
        return 0

    def get_device_properties(self, device: EmulatedGpu) -> dict[str, int]:
        return {"max_shared_mem": 48 * 1024}

    def load_binary(self, name: str, code: bytes, shared: int, device: EmulatedGpu) -> tuple[Any, ...]:
        """Module, function, registers, spilled registers, most threads of a block."""
        return self, ptx.Program(code.decode(), shared), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = list(source.signature.values())
        threads = metadata.num_warps * ptx.LANES

        def launch(x: int, y: int, z: int, stream: int, program: ptx.Program, *rest: Any) -> None:
            handed = rest[-len(kinds) :]  # before them: metadata and hooks
            arguments = [value for value, kind in zip(handed, kinds, strict=True) if kind != "constexpr"]
            tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
            bits = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
            memory = ptx.Memory(dict(map(_bytes, tensors)))
            self.launches.append(program.name)
            self.races |= program.run((x, y, z), threads, bits, memory)

        return launch


def _bytes(tensor: torch.Tensor) -> tuple[int, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Where its storage begins, and the storage itself: what a kernel writes is in the tensor."""
    storage = tensor.untyped_storage()
    kind = ctypes.c_uint8 * storage.nbytes()
    if storage.nbytes() == 0:
        return 0, np.empty(0, np.uint8)
    return storage.data_ptr(), np.ctypeslib.as_array(kind.from_address(storage.data_ptr()))
