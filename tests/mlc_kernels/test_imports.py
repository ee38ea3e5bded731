"""Importing the operator loads little, and our folder does not hide the package of the same name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NOT_NEEDED = ("triton", "transformers", "lightning", "kernels", "lightning_mlc")

# At first the modules can be imported, because blocked ones would not show attempts (`try: import triton` would pass).
# Then everything of ours is imported again without them.
TORCH_ONLY = f"""
import sys; sys.path.insert(0, 'kernels')
import torch

def use():
    import mlc_kernels
    x = torch.ones(1, 2, 3, requires_grad=True); mlc_kernels.mlc_loss(x).backward()

use()
print([name for name in {NOT_NEEDED} if name in sys.modules])
for name in [name for name in sys.modules if name.startswith('mlc_kernels')]:
    del sys.modules[name]
for name in {NOT_NEEDED}:
    sys.modules[name] = None
use()
"""


def test_loads_and_needs_torch_only() -> None:
    assert run(TORCH_ONLY).strip() == "[]"


needs_hugging_face_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels.layer") is None,
    reason="the package `kernels` is not installed",
)


def test_our_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@needs_hugging_face_kernels
@pytest.mark.slow
def test_does_not_hide_the_hugging_face_package_kernels() -> None:
    """From the root of a clone, `import kernels` must find the installed package, not our folder."""
    found = run("import kernels; print(kernels.__file__)").strip()
    assert "site-packages" in found
    run("import transformers; from transformers import LlamaForCausalLM")
