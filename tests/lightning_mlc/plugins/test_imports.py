"""The plug-in needs no Lightning, which people who train with something else do not have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import save_model
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_earlier_releases_of_transformers_can_import_the_plug_in() -> None:
    """LLaMA-Factory and Axolotl pin one that has no ``GgufConfig``, which loading a model needs."""
    code = "import lightning_mlc.plugins.options, sys; assert 'lightning_mlc.models.loading' not in sys.modules"
    found = run(code)
    assert found.returncode == 0, found.stderr


IMPORTED = """
import ast, importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
found = set()
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("lightning_mlc", "mlc_kernels") and module.__file__:
        for node in ast.parse(open(module.__file__, encoding="utf-8").read()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
print(json.dumps(sorted(found - set(sys.stdlib_module_names) - {"lightning_mlc", "mlc_kernels"})))
"""


def requirements_of(*names: str) -> set[str]:
    """Distributions that pip installs with these."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            for text in metadata.requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    waiting.append(needed.name)
    return found


@pytest.mark.slow
def test_the_install_line_of_the_page_has_all_that_an_import_needs() -> None:
    """For an environment with torch and transformers, into which the package comes without its requirements."""
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    line = re.search(r"^pip install (.+) && pip install --no-deps \.$", page, flags=re.M)
    assert line is not None
    there = requirements_of("torch", "transformers", *line[1].split())
    imported = json.loads(run(IMPORTED, "lightning_mlc.plugins").stdout)
    names = metadata.packages_distributions()
    missing = {name for name in imported if not {canonicalize_name(found) for found in names[name]} & there}
    assert {"torch", "transformers", "langcodes", "datasets"} <= set(imported)
    assert missing == set()
