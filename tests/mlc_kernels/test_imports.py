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


USE = (
    "import sys; sys.path.insert(0, 'kernels')\n"
    "{}\n"
    "import torch, mlc_kernels\n"
    "x = torch.ones(1, 2, 3, requires_grad=True); mlc_kernels.mlc_loss(x).backward()\n"
    "{}"
)
NOT_NEEDED = ("triton", "transformers", "lightning", "kernels", "lightning_mlc")


def test_needs_torch_only() -> None:
    run(USE.format(f"for name in {NOT_NEEDED}: sys.modules[name] = None", ""))


def test_loads_torch_only() -> None:
    """Blocked modules do not tell: `try: import triton` would pass. Here they are there to be loaded."""
    loaded = run(USE.format("", f"print([name for name in {NOT_NEEDED} if name in sys.modules])"))
    assert loaded.strip() == "[]"


needs_hugging_face_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels.layer") is None,
    reason="the package `kernels` is not installed",
)


def test_our_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@needs_hugging_face_kernels
def test_does_not_hide_the_hugging_face_package_kernels() -> None:
    """From the root of a clone, `import kernels` must find the installed package and not our folder."""
    found = run("import kernels; print(kernels.__file__)").strip()
    assert "site-packages" in found
    run("import transformers; from transformers import LlamaForCausalLM")
