"""What the tests of the kernels share, wherever these run."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten shows: uninitialised memory is NaN, or a number that is out of range."""
    original = Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = original(self, *size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -(2**20))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
