"""Count the bytes of tensors that operations create, for as long as the tensors live.

It works with PyTorch's fake tensors, which have shapes but no values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IS_SO = False
"""The answer when a model asks for the truth value of a tensor, which has no values here. Recurrent models ask whether
a batch has no padding, and then do less work. The largest batch usually has padding."""


def _grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The result of ``torch.nn.functional.grouped_mm``, the product of all experts at once, without its values.

    For fake tensors torch refuses all dtypes but bfloat16, although the real product takes float32.
    """
    rows, columns = a.shape[-2], b.shape[-1]
    groups = [len(offs)] if offs is not None and a.ndim == b.ndim == 2 else list(a.shape[:-2]) if b.ndim == 3 else []
    return a.new_empty([*groups, rows, columns], dtype=out_dtype or a.dtype)


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations create, for as long as the tensors live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return IS_SO
        before = {self._key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        run = _grouped_product if function is torch.ops.aten._grouped_mm.default else function
        result = run(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._key(tensor) not in before | self._seen:
                self._add(tensor.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _add(self, storage: Any) -> None:
        key, size = int(storage._cdata), int(storage.nbytes())
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@contextmanager
def counting() -> Iterator[_Count]:
    """Counts the memory that operations inside the context allocate."""
    with _Count() as count:
        yield count
