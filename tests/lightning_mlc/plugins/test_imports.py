"""The plug-in needs no Lightning, which people who train with something else do not have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import save_model

ROOT = Path(__file__).parents[3]
WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
NOT_NEEDED = (
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "jsonargparse"),
    "matplotlib",
)
ONE_LOSS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from lightning_mlc.plugins import MLCRegularizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompts = [{"en": "How are you?", "sw": "Habari yako?"}]
mlc = MLCRegularizer(prompts, AutoTokenizer.from_pretrained(sys.argv[1]), extractor_dim=16)
loss = mlc.loss(model, step=0)
loss.backward()
assert model.get_input_embeddings().weight.grad.abs().sum() > 0
assert mlc.metrics().keys() >= {"mlc/loss", "mlc/min_cosine"}
print("loss", float(loss))
"""


def run(code: str, *arguments: str, without: tuple[str, ...] = NOT_NEEDED) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=without) + code, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": "kernels", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_regularizer_computes_its_loss_without_lightning(tmp_path: Path) -> None:
    found = run(ONE_LOSS, str(save_model(tmp_path)))
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.split("loss ")[1]) > 0


def test_the_packages_are_blocked() -> None:
    """So that the test above can fail."""
    found = run("import lightning_mlc.plugins.lightning")
    assert found.returncode == 1
    assert "No module named" in found.stderr
