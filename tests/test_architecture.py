"""Which package imports which. Dependencies point one way: there is no cycle, and no package imports one above it."""

from __future__ import annotations

import ast
import pkgutil
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GROUND = {"errors", "lightning_internals", "processes", "sources"}
"""Modules at the top that every package may import. They import no package."""
MAY_IMPORT = {
    "files": set(),
    "report": {"files"},
    "progress": set(),
    "data": {"files", "progress"},
    "objectives": {"data"},
    "models": {"data", "objectives"},
    "consistency": {"data", "models"},
    "metrics": {"consistency", "report"},
    "checkpoints": {"consistency", "files", "models"},
    "distributed": {"checkpoints", "data", "models"},
    "reference": {"checkpoints", "consistency", "data", "distributed", "files", "models", "objectives", "progress"},
    "export": {"checkpoints", "data", "models", "progress", "report"},
    "evaluation": {"checkpoints", "consistency", "data", "files", "metrics", "models", "progress", "report"},
    "training": {
        "checkpoints",
        "consistency",
        "data",
        "distributed",
        "evaluation",
        "files",
        "metrics",
        "models",
        "objectives",
        "progress",
        "reference",
        "report",
    },
    "lint": {"data", "evaluation", "files", "progress"},
    "translation": {"data", "evaluation", "files", "lint", "progress"},
    "plugins": {"consistency", "data", "files", "models", "progress"},
    "commands": {
        "checkpoints",
        "data",
        "distributed",
        "evaluation",
        "export",
        "files",
        "lint",
        "models",
        "objectives",
        "progress",
        "training",
        "translation",
    },
    "cli": {"commands", "progress"},
    "__main__": {"cli"},
    # Former names, which users' configurations may contain.
    "schedules": {"training"},
    "sharding": {"distributed"},
}
"""The packages that each package may import, in addition to the modules of GROUND."""


def modules() -> dict[str, Path]:
    packages = ("lightning_mlc", "kernels/mlc_kernels", "benchmarks")
    paths = {path for package in packages for path in (ROOT / package).rglob("*.py")}
    named = {path: path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT) for path in paths}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for path, name in named.items()}


MODULES = modules()


def imported_by(module: str) -> set[str]:
    """Our modules that ``module`` imports anywhere, including imports for types and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def room(module: str) -> str:
    """The package or top-level module of ``lightning_mlc`` that ``module`` belongs to."""
    return [*module.split("."), "__init__"][1]


OURS = sorted(module for module in MODULES if module.startswith("lightning_mlc."))


@pytest.mark.parametrize("package", sorted({room(module) for module in OURS}))
def test_a_package_imports_only_what_the_table_says(package: str) -> None:
    used = {
        room(imported)
        for module in OURS
        if room(module) == package
        for imported in imported_by(module)
        if imported.startswith("lightning_mlc")
    } - {package, "__init__"}
    if package in GROUND:
        assert used <= GROUND
    else:
        # Equality, so that the table allows nothing that is not needed.
        assert used - GROUND == MAY_IMPORT[package]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: imported_by(module) - {module} for module in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_nothing_imports_the_benchmarks() -> None:
    importing = {
        module
        for module in MODULES
        if not module.startswith("benchmarks")
        for imported in imported_by(module)
        if imported.startswith("benchmarks")
    }
    assert importing == set()


def test_the_kernels_import_nothing_of_the_rest() -> None:
    kernels = [module for module in MODULES if module.split(".")[0] == "mlc_kernels"]
    assert len(kernels) > 5
    assert {name for module in kernels for name in imported_by(module) if not name.startswith("mlc_kernels")} == set()


LONGEST = {ast.Module: 400, ast.ClassDef: 300, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
"""Largest number of lines of a file, a class and a function. Docstrings of classes and functions do not count."""
TABLES = {"lightning_mlc.evaluation.judges.phrases", "mlc_kernels.loss_kernels"}
"""Exceptions: a table of phrases by language, and kernels, which Triton compiles as one function."""


def lines_of(node: ast.AST, text: str) -> int:
    if isinstance(node, ast.Module):
        return len(text.splitlines())
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    assert node.end_lineno is not None
    length = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        length -= first.end_lineno - first.lineno + 1
    return length


def test_files_classes_and_functions_are_short() -> None:
    measured = [
        (module, getattr(node, "name", "file"), lines_of(node, text), LONGEST[type(node)])
        for module, path in sorted(MODULES.items())
        if module not in TABLES
        for text in [path.read_text(encoding="utf-8")]
        for node in ast.walk(ast.parse(text))
        if type(node) in LONGEST
    ]
    assert len(measured) > 1000
    assert [found for found in measured if found[2] > found[3]] == []


def test_references_in_docstrings_lead_somewhere() -> None:
    """Check references with a full path, such as ``:func:`lightning_mlc.sources.load_config```."""
    whole = re.compile(r":(?:mod|class|func|meth|data):`~?((?:lightning_mlc|mlc_kernels|benchmarks)\.[\w.]+)`")
    found = {name for path in MODULES.values() for name in whole.findall(path.read_text(encoding="utf-8"))}
    assert len(found) > 30
    broken = []
    for name in sorted(found):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            broken.append(name)
    assert broken == []
