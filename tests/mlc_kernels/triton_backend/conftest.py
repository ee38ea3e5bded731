"""These tests run on a GPU if there is one, otherwise in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so it needs its own process, which test_interpreter.py in the
parent folder starts. Without the interpreter and without a GPU, nothing is collected here.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
collect_ignore_glob = [] if HERE else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="tests the device, not numbers"))
