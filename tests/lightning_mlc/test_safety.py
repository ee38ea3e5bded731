"""Files from strangers are data: no command that reads one runs anything in it.

Each payload makes a file. Where a reader can be allowed to run code, the same payload is shown to work.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, save_model, write_jsonl

from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.cli import main
from lightning_mlc.commands.training import run
from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.sources import ModelSource, load_tokenizer


class Payload:
    """A pickle that makes the file ``path`` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that a payload makes."""
    return tmp_path / "ran"


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line with which ``command`` ends."""
    capsys.readouterr()
    assert main(list(command)) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    return told


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The options of a run, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    options = {
        "model.name_or_path": save_model(folder / "model"),
        "data.train_path": write_jsonl(folder / "pairs.jsonl", example_rows(12)),
        "data.val_share": 0.25,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    run(["fit", *words, f"--out={folder / 'run'}", "--trainer.max_steps=1"])
    return words, folder / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("form", ["torch", "pickle", "beside good weights"])
def test_a_checkpoint_that_is_a_program(
    trained: tuple[list[str], Path], tmp_path: Path, ran: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, good = trained
    bad = tmp_path / "bad.ckpt"
    if form == "pickle":
        bad.write_bytes(pickle.dumps(Payload(ran)))
    else:
        whole = torch.load(good, weights_only=True) if form == "beside good weights" else {"state_dict": {}}
        torch.save({**whole, "callbacks": {"a": Payload(ran)}}, bad)
    out = f"--out={tmp_path / 'out'}"
    commands = [["export", f"--ckpt_path={bad}", out]]
    if form == "beside good weights":  # and read by Lightning
        commands += [["validate", *words, f"--ckpt_path={bad}", out]]
        commands += [["fit", *words, f"--ckpt_path={bad}", out, "--trainer.max_steps=2"]]
    for command in commands:
        assert "bad.ckpt is not a checkpoint that lightning-mlc wrote" in refused(capsys, *command)
        assert not ran.exists()
    with bad.open("rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert ran.exists()  # otherwise the lines above show nothing


def test_a_checkpoint_names_no_class(
    trained: tuple[list[str], Path], tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning would create the class that ``_class_path`` or the type of the hyper-parameters names; we create
    nothing."""
    words, good = trained
    checkpoint = torch.load(good, weights_only=True)
    attack = {"_class_path": "subprocess.Popen", "args": ["touch", str(ran)]}
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        checkpoint[key] = {**attack, "_instantiator": "subprocess.Popen", "class_path": "subprocess.Popen"}
    checkpoint["hparams_type"] = "subprocess.Popen"
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    bad = f"--ckpt_path={tmp_path / 'bad.ckpt'}"
    assert main(["fit", *words, bad, f"--out={tmp_path / 'out'}", "--trainer.max_steps=2"]) == 0
    assert main(["export", bad, f"--out={tmp_path / 'model'}"]) == 0
    assert not ran.exists()


REMOTE_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({path!r}).touch()
class Config(LlamaConfig):
    model_type = "unheard-of"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def repository(tmp_path: Path, ran: Path) -> Path:
    """A model folder that contains code."""
    folder = save_model(tmp_path / "repository")
    (folder / "code.py").write_text(REMOTE_CODE.format(path=str(ran)))
    for name, added in (
        ("config.json", {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}),
    ):
        content = json.loads((folder / name).read_text())
        content |= added
        content["auto_map"] = dict.fromkeys(content["auto_map"]) | content["auto_map"]
        if name == "config.json":
            content["auto_map"]["AutoModelForCausalLM"] = "code.Model"
        else:
            content["tokenizer_class"] = "Tokenizer"
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_checkpoint_that_asks_for_trust(
    trained: tuple[list[str], Path],
    repository: Path,
    tmp_path: Path,
    ran: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is plain data, but names a model with code, which only the reader may allow to run."""
    checkpoint = torch.load(trained[1], weights_only=True)
    source = {"name_or_path": str(repository), "trust_remote_code": True}
    checkpoint[Provenance.KEY]["source"] |= source
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    export = ["export", f"--ckpt_path={tmp_path / 'bad.ckpt'}", f"--out={tmp_path / 'model'}"]
    assert "--trust_remote_code" in refused(capsys, *export)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": {"en": "Hello"}}])
    evaluate = ["evaluate", "--models", f"m={tmp_path / 'bad.ckpt'}", f"--prompts={tmp_path / 'prompts.jsonl'}"]
    refused(capsys, *evaluate, f"--out={tmp_path / 'evaluation'}")
    checkpoint[Provenance.KEY]["source"]["trust_remote_code"] = False
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    assert "custom code" in refused(capsys, *export)
    assert not ran.exists()
    assert main([*export, "--trust_remote_code"]) == 0
    assert ran.exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "cannot be read"),
        ({"unknown": 1}, "cannot be read"),
        ({"source": {"name_or_path": "x", "run": "y"}}, "cannot be read"),
        ({"config": {"model_type": "unheard-of"}}, "does not fit the model"),
        ({"config": {"model_type": "gpt2", "n_layer": 1, "vocab_size": 9}}, "does not fit the model"),
    ],
)
def test_a_checkpoint_that_says_nonsense_of_its_model(
    trained: tuple[list[str], Path], tmp_path: Path, entry: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    checkpoint[Provenance.KEY] = checkpoint[Provenance.KEY] | entry if isinstance(entry, dict) else entry
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    told = refused(capsys, "export", f"--ckpt_path={tmp_path / 'bad.ckpt'}", f"--out={tmp_path / 'model'}")
    assert message in told
    assert not (tmp_path / "model").exists()


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_weights_that_are_a_program(
    tmp_path: Path, ran: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    if form == "torch":
        torch.save({"weight": Payload(ran)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Payload(ran)))
    words = [f"--model.name_or_path={folder}", "--data.train_path=sample", f"--out={tmp_path / 'out'}"]
    assert "cannot load a causal language model from" in refused(capsys, "fit", *words, "--trainer.accelerator=cpu")
    assert not ran.exists()
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: load(*args, **{**options, "weights_only": False}))
    with suppress(Exception):  # the payload is not a model either
        load_causal_lm(ModelSource(str(folder)), torch.float32)
    assert ran.exists()


def test_weights_that_are_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    words = [f"--model.name_or_path={folder}", "--data.train_path=sample", f"--out={tmp_path / 'out'}"]
    assert "cannot load a causal language model from" in refused(capsys, "fit", *words, "--trainer.accelerator=cpu")


def test_code_beside_a_model_or_a_tokenizer(
    repository: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--model.name_or_path={repository}", "--data.train_path=sample", f"--out={tmp_path / 'out'}"]
    assert "contains custom code" in refused(capsys, "fit", *words)
    with pytest.raises(UserError, match="contains custom code"):
        load_tokenizer(ModelSource(str(repository)))
    assert not ran.exists()
    load_tokenizer(ModelSource(str(repository), trust_remote_code=True))
    assert ran.exists()


@pytest.fixture
def importable(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package that runs code when it is imported."""
    package = tmp_path / "path" / "evil_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n")
    (package / "inner").mkdir()
    monkeypatch.syspath_prepend(str(package.parent))
    yield package.name
    sys.modules.pop(package.name, None)


def test_a_package_is_found_without_being_imported(importable: str, ran: Path) -> None:
    for name in (importable, f"{importable}.inner"):
        with pytest.raises(UserError):
            load_tokenizer(ModelSource(f"package:{name}"))
    assert not ran.exists()


# ---- configurations ------------------------------------------------------------------------------------------------

CALLS: dict[str, str] = {
    "a tag of YAML": "model: !!python/object/apply:os.system ['{}']",
    "an objective": "model: {{objective: {{class_path: os.system, init_args: {{command: '{}'}}}}}}",
    "a function for an optimizer": "model: {{optimizer: {{class_path: os.system, init_args: {{command: '{}'}}}}}}",
    "a class for an optimizer": "model: {{optimizer: {{class_path: subprocess.Popen, init_args: {{args: '{}', "
    "shell: true}}}}}}",
    "a function for a schedule": "model: {{scheduler: {{class_path: os.system, init_args: {{command: '{}'}}}}}}",
    "a callback": "trainer: {{callbacks: [{{class_path: os.system, init_args: {{command: '{}'}}}}]}}",
    "a logger": "trainer: {{logger: {{class_path: subprocess.Popen, init_args: {{args: '{}', shell: true}}}}}}",
    "a strategy": "trainer: {{strategy: {{class_path: os.system, init_args: {{command: '{}'}}}}}}",
    "a profiler": "trainer: {{profiler: {{class_path: os.system, init_args: {{command: '{}'}}}}}}",
    "a model": "model: {{class_path: os.system, init_args: {{command: '{}'}}}}",
}


@pytest.mark.parametrize("place", CALLS)
def test_a_configuration_that_calls(place: str, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(CALLS[place].format(f"touch {ran}"))
    words = ["--model.name_or_path=/nowhere", "--data.train_path=sample", f"--out={tmp_path / 'out'}"]
    told = refused(capsys, "fit", f"--config={tmp_path / 'bad.yaml'}", *words)
    assert "/nowhere" not in told  # it got no further than the configuration
    assert not ran.exists()


def test_a_configuration_imports_what_it_names(
    importable: str, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This runs that module: a configuration needs as much trust as a command line.

    The class itself, which is not a callback, is not created.
    """
    (tmp_path / "bad.yaml").write_text(f"trainer: {{callbacks: [{{class_path: {importable}.Evil}}]}}")
    words = ["--model.name_or_path=/nowhere", "--data.train_path=sample", f"--out={tmp_path / 'out'}"]
    assert "does not correspond to a subclass of Callback" in refused(
        capsys, "fit", f"--config={tmp_path / 'bad.yaml'}", *words
    )
    assert ran.exists()
