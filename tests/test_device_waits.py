"""The recorder of waits finds each kind of wait, and nothing that does not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_waits import DEVICE, DeviceWaits
from torch import Tensor

WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where without values": lambda x: torch.where(x > 0),
    "a mask as index": lambda x: x[x > 0],
    "values to a mask": lambda x: x.clone().index_put_((x > 0,), torch.ones(3)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "eigh": lambda x: torch.linalg.eigh(x[:, None] * x),
    "svd": lambda x: torch.linalg.svdvals(x[:, None] * x),
    "new_tensor": lambda x: x.new_tensor(1.0),
    "tensor on the device": lambda x: torch.tensor(1.0, device=x.device),
    "copied to the device": lambda x: torch.ones(3).to(DEVICE),
    "in the backward pass": lambda x: _Looks.apply(x.clone().requires_grad_()).sum().backward(),
}
PASSING: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + 1).sum() / x.norm(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "one value to a mask": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "where": lambda x: torch.where(x > 0, x, float("nan")),
    "numbers as index": lambda x: x[torch.arange(2)],
    "new_full": lambda x: x.new_full((), 3),
    "copied without waiting": lambda x: torch.ones(3).to(DEVICE, non_blocking=True),
    "values on the host": lambda x: [torch.ones(3).sum().item(), bool(torch.ones(1)), torch.ones(3).nonzero()],
    "a number on the host": lambda x: torch.tensor(1.0),
    "dtype": lambda x: x.to(torch.float64).float(),
}


class _Looks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * gradient.sum().item()


@pytest.fixture
def waits() -> DeviceWaits:
    return DeviceWaits()


def on_device() -> Tensor:
    return torch.tensor([1.0, -2.0, 3.0, 4.0])


@pytest.mark.parametrize("name", WAITING)
def test_finds_what_waits(name: str, waits: DeviceWaits) -> None:
    x = on_device()
    waits.put(x)
    with waits:
        WAITING[name](x)
    assert waits.found, "nothing was recorded"
    assert all("test_device_waits.py" in wait.where for wait in waits.found)


@pytest.mark.parametrize("name", PASSING)
def test_finds_nothing_else(name: str, waits: DeviceWaits) -> None:
    x = on_device()
    waits.put(x)
    with waits:
        PASSING[name](x)
    assert waits.found == []


def test_follows_what_is_computed(waits: DeviceWaits) -> None:
    host = torch.ones(3)
    with waits:
        found = (host.to(DEVICE, non_blocking=True) * 2 + host).sum()
        host.sum().item()
        arrived = found.cpu()
        arrived.item()  # on the host
    assert waits.holds(found)
    assert not waits.holds(arrived)
    assert [wait.operation for wait in waits.found] == ["cpu"]
