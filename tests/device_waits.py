"""Finds where a program waits for the device, without a device.

On a GPU, kernels run while the host goes on. The host has to wait when it needs a value: for ``item``, ``bool``,
``tolist``, the indices of ``nonzero`` or of a mask, a copy to the host, or a copy from the host that is not
``non_blocking``. On a CPU nothing waits. So :class:`DeviceWaits` follows every tensor that would be on the device:
those that are copied to it, those that it is told, and everything that is computed from them. Each operation that
would wait for one of them is recorded, with the line that asked for it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu:0")
"""The device. It is the CPU, but PyTorch does copy tensors to it, because its name is not ``cpu``, where they are."""
OPERATOR = "mlc_kernels/"
"""Part of the lines of the operator. On the CPU it looks at values, because there this costs nothing. On a GPU another
implementation runs, and ``tests/mlc_kernels/triton_backend/test_operator.py`` holds that it never waits."""
ROOT = Path(__file__).parents[1]

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item, bool, float, int
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten._linalg_eigh.default,  # solvers report errors to the host
    aten._linalg_svd.default,
}
"""Operations whose result, or whose size of the result, the host has to know."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that wait if an index is a mask."""
TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


@dataclass(frozen=True)
class Wait:
    """One wait for the device."""

    operation: str
    where: str
    """The innermost line, and the innermost line of this repository if that is another one."""
    place: Any
    """The value of ``DeviceWaits.place`` at the time."""


class DeviceWaits:
    """Records every wait for the device inside the context, in this thread.

    Args:
        device: The device to which a copy is a copy from the host.
    """

    def __init__(self, device: torch.device = DEVICE) -> None:
        self.device = device
        self.found: list[Wait] = []
        self.place: Any = None
        """Is stored with each wait. A test can set it to what is running."""
        self._storages: dict[int, StorageWeakRef] = {}
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def put(self, *values: Any) -> None:
        """Treat the tensors in ``values`` (modules, dataclasses, and containers of them) as being on the device."""
        for tensor in tensors_in(values):
            storage = tensor.untyped_storage()
            # The weak reference keeps the address from being used again.
            self._storages[storage._cdata] = StorageWeakRef(storage)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` would be on the device."""
        return tensor.untyped_storage()._cdata in self._storages

    def record(self, operation: str) -> None:
        self.found.append(Wait(operation, _where(), self.place))


class _Operations(TorchDispatchMode):
    """Sees what PyTorch runs, also in the backward pass."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = any(self._waits.holds(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if held and func in READS:
            self._waits.record(str(func))
        # A single value is put by `where`, and needs no indices.
        if held and func in INDEXING and _has_mask(args[1]) and (func == aten.index.Tensor or args[2].dim() > 0):
            self._waits.record(f"{func} with a mask")
        output = func(*args, **kwargs)
        if held:
            self._waits.put(output)
        return output


class _Functions(TorchFunctionMode):
    """Sees what Python calls: copies between host and device, which PyTorch does not make on a CPU."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        waits = self._waits
        if func in TO_HOST and waits.holds(args[0]):
            waits.record(func.__name__)
            with _disable_current_modes():  # what arrives is a copy on the host
                return func(args[0].detach().clone(), *args[1:], **kwargs)
        # "cpu" by name is the host. A device that was taken from a tensor or a module is the device.
        if func in FROM_HOST and (kwargs.get("device") not in (None, "cpu") or func == Tensor.new_tensor):
            waits.record(f"{func.__name__} on the device")
        moves = func == Tensor.to and any(_is(value, waits.device) for value in (*args[1:], *kwargs.values()))
        if moves and not waits.holds(args[0]) and not kwargs.get("non_blocking"):
            waits.record("to the device, not non_blocking")
        output = func(*args, **kwargs)
        if moves:
            waits.put(output)
        return output


def tensors_in(value: Any) -> Iterable[Tensor]:
    """All tensors in modules, dataclasses and containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


def _is(value: Any, device: torch.device) -> bool:
    return isinstance(value, torch.device) and value == device


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _where() -> str:
    frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
    own = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename]
    lines = [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in (frames[-1], *own[-1:])]
    return " < ".join(dict.fromkeys(lines))
