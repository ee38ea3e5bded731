"""Names of models that can only be mistyped paths are refused before the hub is asked; models that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from lightning_mlc.errors import UserError
from lightning_mlc.sources import ModelSource, from_pretrained


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``runs/first`` and an empty cache of the hub in it."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def asked(source: ModelSource) -> list[str]:
    """The names that a ``from_pretrained`` of transformers is called with."""
    calls: list[str] = []

    def load(name: str, **keywords: Any) -> None:
        calls.append(name)

    from_pretrained(load, source, "model")
    return calls


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            ModelSource("runs/frist"),
            "there is no folder runs/frist, and runs is a folder here; did you mean runs/first?",
        ),
        (ModelSource("runs/other"), "if runs/other is on the hub, give its revision, too, such as main"),
        (ModelSource("runs/last.ckpt"), "there is no folder runs/last.ckpt, and runs is a folder here"),
        (ModelSource("runs/x", gguf_file="a.gguf"), "there is no folder runs/x, and runs is a folder here"),
        (
            ModelSource("runs/first/model/x"),
            "there is no folder runs/first/model/x, and no id of the hub has this form",
        ),
        (ModelSource("my model"), "there is no folder my model, and no id of the hub has this form; give a model"),
        (ModelSource("gone/model.gguf"), "there is no file gone/model.gguf; give a GGUF file that exists"),
        (ModelSource("./gone"), "there is no folder ./gone"),
        (ModelSource("~/gone/away"), "there is no folder ~/gone/away"),
        (ModelSource("/gone/away"), "there is no folder /gone/away"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistyped_paths_are_refused_without_the_hub(source: ModelSource, said: str, here: Path) -> None:
    with pytest.raises(UserError) as told:
        asked(source)
    assert str(told.value).startswith("model.name_or_path: there is no ")
    assert said in str(told.value)


def test_ids_of_the_hub_are_loaded(here: Path) -> None:
    (here / "owner").mkdir()
    for name in ("gpt2", "other/name"):
        assert asked(ModelSource(name)) == [name]
    assert asked(ModelSource("owner/name", revision="main")) == ["owner/name"]
    # Once it was loaded from the hub, its name is no mistake.
    with pytest.raises(UserError, match="owner is a folder here"):
        asked(ModelSource("owner/name"))
    commit = "0" * 40
    snapshot = here / "hub" / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (here / "hub" / "models--owner--name" / "refs").mkdir()
    (here / "hub" / "models--owner--name" / "refs" / "main").write_text(commit)
    assert asked(ModelSource("owner/name")) == ["owner/name"]


def test_weights_of_another_configuration_are_refused(tmp_path: Path) -> None:
    file = save_model(tmp_path / "model") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 64}))
    with pytest.raises(UserError, match=r"model have other shapes than its configuration says; give a model whose"):
        from_pretrained(AutoModelForCausalLM.from_pretrained, ModelSource(str(tmp_path / "model")), "model")


def test_other_errors_of_torch_are_not_hidden(here: Path) -> None:
    def load(name: str, **keywords: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        from_pretrained(load, ModelSource("gpt2"), "model")
