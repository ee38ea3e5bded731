"""The command itself: its answers before anything heavy is loaded, and its messages about errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import example_rows, write_jsonl

from lightning_mlc import __version__
from lightning_mlc.cli import COMMANDS, main
from lightning_mlc.commands.training import run, shipped_configs

HEAVY = ("torch", "lightning", "transformers", "datasets", "matplotlib")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("option", ["--help", "--version", "no-such-command"])
def test_answers_without_loading_what_takes_seconds(option: str) -> None:
    code = (
        f"import sys; from lightning_mlc.cli import main; main([{option!r}])\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for args, status in ((["--help"], 0), ([], 2)):
        assert main(args) == status
        shown = capsys.readouterr().out
        assert all(f"\n  {name}" in shown for name in COMMANDS)


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lightning_mlc", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"lightning-mlc {__version__}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["fti"],
            "there is no command 'fti'; choose one of fit, validate, test, predict, estimate, evaluate, translate, "
            "lint, export",
        ),
        (["fit"], "model.name_or_path: is not set; give it, or a configuration: lightning-mlc fit --config FILE"),
        (["fit", "--config", "gone.yaml"], "--config: there is no file gone.yaml; give a file, or one of the shipped"),
        (
            ["fit", "--config=quickstart", "--model.consistency.mlc.wieght=0"],
            "no option --model.consistency.mlc.wieght; did you mean",
        ),
        (["fit", "--config=quickstart", "--model.consistency.every_n_steps=x"], "every_n_steps"),
        (["fit", "--config=quickstart", "--model.objective=Nothing"], "Expected a dot import path string: Nothing"),
        (["fit", "--config=quickstart", "--model.objective=SFT", "--model.objective.beta=1"], "'beta' is not accepted"),
        (["fit", "--config=quickstart", "--model.lora.r=x"], "x"),
        (["fit", "--config=quickstart", "--model.consistency.layer=Auto"], "layer: must be a number or auto, got Auto"),
        (
            ["fit", "--config=quickstart", "--trainer.limit_train_batches=x"],
            "trainer.limit_train_batches: must be a number or null, got x",
        ),
        (["fit", "--config=quickstart", "--trainer.devices=[x]", "--trainer.accelerator=cpu"], "trainer: "),
        (["fit", "--config=quickstart", "--data.languages=[en,tlh1]"], "data.languages: 'tlh1' is not a language code"),
        (["fit", "--config=quickstart", "--data.languages=[en,EN]"], "language 'en' is given twice"),
        (
            ["fit", "--config=quickstart", "--trainer.accelerator=abacus"],
            "trainer: You selected an invalid",
        ),
        (["lint", "data.jsonl", "--fixx"], "there is no option --fixx; did you mean --fix?"),
        (["lint"], "FILE: is not set; give it (see lightning-mlc lint --help)"),
        (["lint", "data.jsonl", "--rows", "some"], "argument --rows: invalid int value: 'some'"),
        (["export", "--ckpt_path=last.ckpt", "--outt=model"], "--out: is not set"),
        (["export", "--ckpt_path=last.ckpt"], "--out: is not set; give it (see lightning-mlc export --help)"),
        (["evaluate", "--models=model", "--judge", "margin"], "there is no option --judge; did you mean --judges?"),
    ],
)
def test_a_wrong_call_gets_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if not line.startswith(("Seed set", "INFO"))]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert "Union" not in errors[0]
    assert printed.out == ""
    assert not any(tmp_path.iterdir())


def test_a_configuration_file_with_a_wrong_list_gets_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("data:\n  train_path: [a.jsonl, null]\n")
    assert main(["fit", "--config=quickstart", f"--config={tmp_path / 'run.yaml'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: data.train_path: must be text, a list of texts or null, got ['a.jsonl', None]"
    )


def test_a_missing_file_is_told_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model does not exist either, and its message would come first if it were checked first."""
    options = [f"--model.name_or_path={tmp_path}/no-model", f"--data.train_path={tmp_path}/no.jsonl"]
    assert main(["fit", f"--out={tmp_path / 'out'}", "--trainer.accelerator=cpu", *options]) == 2
    assert "data.train_path: there is no file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_users_config_beats_a_shipped_one_of_the_same_name(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", example_rows(4))
    own = {"model": {"name_or_path": str(tiny_model)}, "data": {"train_path": str(data)}, "out": "mine"}
    (tmp_path / "quickstart").write_text(yaml.safe_dump(own))
    monkeypatch.chdir(tmp_path)
    for config, out in (("quickstart", "mine"), ("configs/quickstart.yaml", "runs/quickstart")):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", config, "--print_config"])
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["out"] == out


def test_shipped_configs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "dpo_mlc", "sft_mlc", "published", "lora", "logger/wandb"} <= shipped_configs().keys()


@pytest.mark.parametrize("given", [["--model.optimizer=AdamW"], ["--model.optimizer", "AdamW"]])
def test_a_bare_optimizer_is_that_of_torch(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other libraries, imported or not, have optimizers of the same name, for example bitsandbytes."""
    name = "AdamW"
    other: Any = type(
        name, (torch.optim.Optimizer,), {"__module__": "other_library", "__init__": lambda self, params: None}
    )
    module: Any = ModuleType("other_library")
    module.AdamW = other
    monkeypatch.setitem(sys.modules, "other_library", module)
    with pytest.raises(SystemExit):
        run(["fit", "--config=quickstart", *given, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
