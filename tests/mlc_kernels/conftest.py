"""Fixtures for all tests of the kernels."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make unwritten memory visible: uninitialised memory is NaN, or an integer that is out of range."""
    original = Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = original(self, *size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -(2**20))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
