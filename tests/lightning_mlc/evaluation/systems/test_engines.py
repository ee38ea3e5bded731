"""Which library runs a local model, that it releases the model, and which hub revision it runs."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model, write_jsonl
from huggingface_hub import constants

from lightning_mlc.cli import main
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.sources import ModelSource

QUICK = ["--max_new_tokens=4", "--bootstrap=100", "--device=cpu", "--representation_prompts=0"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Loadings and closings, in order. vLLM is a stand-in that answers "Safety: Safe" to everything."""
    seen: list[str] = []

    class LLM:
        def __init__(self, model: str, **_: Any) -> None:
            seen.append("vllm")
            core = types.SimpleNamespace(shutdown=lambda: seen.append("closed"))
            self.llm_engine = types.SimpleNamespace(engine_core=core)

        def generate(self, prompts: list[Any], *_: Any, **__: Any) -> list[Any]:
            assert seen[-1] == "vllm"  # it is open
            one = types.SimpleNamespace(text="Safety: Safe\nRefusal: No", finish_reason="stop")
            return [types.SimpleNamespace(outputs=[one])] * len(prompts)

    vllm: Any = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams, vllm.__spec__ = LLM, types.SimpleNamespace, ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    load = System.load_model

    def noted(system: System, dtype: str) -> Any:
        seen.append("transformers")
        return load(system, dtype)

    monkeypatch.setattr(System, "load_model", noted)
    return seen


def test_one_engine_is_closed_before_the_next_one_loads(tmp_path: Path, events: list[str]) -> None:
    """For the likelihoods of the same model, and for the judging models."""
    model = save_model(tmp_path / "one")
    rows = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": {"en": "a"}}, {"prompt": {"en": "b"}}])
    args = [f"--models=m={model}", f"--prompts={rows}", f"--out={tmp_path / 'out'}", "--engine=vllm", *QUICK]
    assert main(["evaluate", *args, f"--judges=margin,qwen3guard={model},qwen3guard_loose={model}"]) == 0
    assert events == ["vllm", "closed", "transformers", "vllm", "closed", "vllm", "closed"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one model at two revisions, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--owner--tiny"
    (place / "refs").mkdir(parents=True)
    for revision, commit, scale in (("main", "a" * 40, 0.02), ("v2", "b" * 40, 0.5)):
        shutil.move(save_model(tmp_path / revision, initializer_range=scale), place / "snapshots" / commit)
        (place / "refs" / revision).write_text(commit)
    return tmp_path / "hub"


def test_a_revision_of_the_hub_can_be_pinned(hub: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": {"en": "a"}}])
    out = tmp_path / "out"
    args = ["evaluate", "--models", "owner/tiny", "owner/tiny@v2", f"old=owner/tiny@{'a' * 40}", f"--prompts={rows}"]
    assert main([*args, "--judges=margin", f"--out={out}", *QUICK]) == 0
    results = json.loads((out / "results.json").read_text())
    commits = {one["name"]: one["identity"] for one in results["models"]}
    assert commits == {
        "tiny": {"hub": "owner/tiny", "commit": "a" * 40},
        "tiny-v2": {"hub": "owner/tiny", "commit": "b" * 40},
        "old": {"hub": "owner/tiny", "commit": "a" * 40},
    }
    margins = {name: json.loads((out / name / "margins.jsonl").read_text())["margin"] for name in commits}
    assert margins["tiny"] == margins["old"] != margins["tiny-v2"]


def test_an_at_sign_in_a_folder_is_part_of_its_name(tmp_path: Path) -> None:
    for name in ("plain", "with@sign"):
        (tmp_path / name).mkdir()
    assert ModelSource.parse(f"{tmp_path}/with@sign") == ModelSource(f"{tmp_path}/with@sign")
    assert ModelSource.parse("owner/name") == ModelSource("owner/name")
    assert ModelSource.parse("owner/name@refs/pr/3") == ModelSource("owner/name", revision="refs/pr/3")
    assert ModelSource.parse("/no@where/model@v1") == ModelSource("/no@where/model@v1")  # and no such folder exists
    with pytest.raises(UserError, match=r"plain is a folder of this machine, which has no revisions; remove @v1"):
        ModelSource.parse(f"{tmp_path}/plain@v1")
    for bad in ("owner/name@", "@v1"):
        with pytest.raises(UserError, match="write owner/name@REVISION"):
            ModelSource.parse(bad)


def test_a_judge_is_pinned_in_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["evaluate", "--models=http://h/v1#m", "--prompts=sample", f"--judges=llm={tmp_path}@v1"]
    assert main([*args, f"--out={tmp_path / 'out'}"]) == 2
    assert f"judges: {tmp_path} is a folder of this machine" in capsys.readouterr().err
