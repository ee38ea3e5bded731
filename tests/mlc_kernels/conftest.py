"""Fixtures for all tests of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make unwritten memory visible: uninitialised memory is NaN, or an integer that is out of range."""
    for owner, name in ((Tensor, "new_empty"), (torch, "empty_like")):
        original = getattr(owner, name)

        def empty(*arguments: Any, _original: Callable[..., Tensor] = original, **options: Any) -> Tensor:
            made = _original(*arguments, **options)
            return made.fill_(float("nan") if made.is_floating_point() else -(2**20))

        monkeypatch.setattr(owner, name, empty)
