"""An installation has both packages, the recipes and the sample, from a wheel and from a clone."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")  # torch brings setuptools, and limits its version
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes build/ and egg-info into the folder that it builds from
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode != 0:
        pytest.skip("needs a git checkout, which lists the files of the project")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_both_packages_and_what_the_quickstart_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "mlc_kernels/functional.py",
        "mlc_kernels/py.typed",
        "lightning_mlc/cli.py",
        "lightning_mlc/py.typed",
        "lightning_mlc/configs/quickstart.yaml",
        "lightning_mlc/configs/logger/wandb.yaml",
        "lightning_mlc/data/sample/sample.jsonl",
        "lightning_mlc/data/sample/README.md",
        "lightning_mlc/chat_templates/plain.jinja",
        "lightning_mlc/lint/report.html.jinja",
        "lightning_mlc/evaluation/reporting/report.html.jinja",
        "lightning_mlc/evaluation/reporting/report.css",
    } <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mlc_kernels", "lightning_mlc"}


def test_what_is_imported_is_declared(wheel: Path) -> None:
    """Imported packages must be declared as dependencies, and not only come with other packages."""
    with zipfile.ZipFile(wheel) as file:
        metadata = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        required = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)", file.read(metadata).decode(), re.MULTILINE)
    base = {name.lower() for name, rest in required if "extra ==" not in rest}
    extras = {name.lower() for name, rest in required if "extra ==" in rest}
    of_bench = {name.lower() for name, rest in required if re.search("extra == .bench", rest)}
    ours = {"lightning_mlc", "mlc_kernels", "benchmarks"}
    # vLLM makes evaluation faster, but needs its own environment. Who uses the plug-in for Axolotl has Axolotl.
    optional = {"vllm", "axolotl"}
    for folder, declared in (
        ("lightning_mlc", base | extras),
        ("kernels/mlc_kernels", {"torch", "triton"}),  # a distribution of its own
        ("benchmarks", base | of_bench),
    ):
        imported = set()
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported.add(str(node.module).split(".")[0])
        found = {
            "pyyaml" if name == "yaml" else name.lower()
            for name in imported - sys.stdlib_module_names - ours - optional
        }
        assert found <= declared, f"{folder} imports {found - declared}"


def test_wheel_works_away_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = "import lightning_mlc, mlc_kernels; print(lightning_mlc.__file__, mlc_kernels.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert all(path.startswith(str(site)) for path in where.stdout.split())
    fit = [sys.executable, "-m", "lightning_mlc", "fit", "--config", "quickstart", "--print_config"]
    printed = subprocess.run(fit, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert yaml.safe_load(printed)["data"]["train_path"] == "sample"


@pytest.mark.parametrize(("folder", "name"), [(".", "lightning_mlc"), ("kernels", "mlc_kernels")])
def test_a_release_has_the_addresses_of_its_repository(folder: str, name: str, tmp_path: Path) -> None:
    """On PyPI a relative link leads nowhere. A build that does not know its repository names none."""

    def metadata(**known: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PROJECT_REPOSITORY"} | known
        write = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
        subprocess.run(write, cwd=ROOT / folder, env=environment, check=True, capture_output=True)
        return (tmp_path / f"{name}.egg-info" / "PKG-INFO").read_text(encoding="utf-8")

    text = metadata(PROJECT_REPOSITORY="https://example.org/us/it")
    assert "\nProject-URL: Source, https://example.org/us/it\n" in text
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("https://", "#"))] == []
    if folder == ".":
        assert re.search(r"!\[[^\]]+\]\(https://example.org/us/it/raw/v[\d.]+/docs/images/[\w.-]+\.png\)", text)
        assert "https://example.org/us/it/blob/v" in text
    assert "example.org" not in metadata()


def test_both_distributions_have_the_same_version() -> None:
    """The published lightning-mlc requires mlc-kernels of its own version."""
    versions = {
        re.findall(r'^__version__ = "(.+)"$', (ROOT / path).read_text(), re.MULTILINE)[0]
        for path in ("lightning_mlc/__init__.py", "kernels/mlc_kernels/__init__.py")
    } | {re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[0]}
    assert len(versions) == 1


def test_constraints_are_within_the_ranges_that_setup_declares() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): pin for name, pin in pins}
    declared = [
        Requirement(text) for text in re.findall(r'"([a-z][^\s{]*[<>=]=[^\s{]+?)"', (ROOT / "setup.py").read_text())
    ]
    assert len(declared) > 10
    for requirement in declared:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_lightning_is_none_of_the_versions_that_carried_malware_or_ran_checkpoints_code(package: str) -> None:
    assert Version(version(package)) >= Version("2.6.6")
