"""What importing the operator costs, and that our folder does not hide the package of its name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_needs_torch_only() -> None:
    run(
        "import sys; sys.path.insert(0, 'kernels')\n"
        "for name in ('triton', 'transformers', 'lightning', 'numpy.f2py'): sys.modules[name] = None\n"
        "import torch, mlc_kernels\n"
        "x = torch.ones(1, 2, 3, requires_grad=True); mlc_kernels.mlc_loss(x).backward()"
    )


@pytest.mark.skipif(importlib.util.find_spec("kernels.layer") is None, reason="the package `kernels` is not installed")
def test_does_not_hide_the_hugging_face_package_kernels() -> None:
    """From the root of a clone, `import kernels` must find the installed package and not our folder."""
    found = run("import kernels; print(kernels.__file__)").strip()
    assert "site-packages" in found
    run("import transformers; from transformers import LlamaForCausalLM")
