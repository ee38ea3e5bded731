"""The MLC loss in LLaMA-Factory: in the real one where it is installed, elsewhere in one that stands in for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import example_rows, save_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import llamafactory

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[3]
ROWS = example_rows(8)
INSTALLED = importlib.util.find_spec("llamafactory") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.0)


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not INSTALLED:
        monkeypatch.syspath_prepend(ROOT / "tests" / "stand_ins")
    yield
    if not INSTALLED:
        for name in [name for name in sys.modules if name.split(".")[0] == "llamafactory"]:
            del sys.modules[name]


def pair(row: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": row["prompt"]["en"], "input": "", "chosen": row["chosen"], "rejected": row["rejected"]}


DATA = {
    "dpo": (pair, {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}),
    "kto": (
        lambda row: {"instruction": row["prompt"]["en"], "output": row["chosen"], "label": int(row["id"][1:]) % 2 == 0},
        {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}},
    ),
    "sft": (
        lambda row: {"instruction": row["prompt"]["en"], "output": row["chosen"]},
        {"columns": {"prompt": "instruction", "response": "output"}},
    ),
    "pt": (lambda row: {"text": row["chosen"]}, {"columns": {"prompt": "text"}}),
}


def configuration(folder: Path, scratch: Path, stage: str = "dpo", **options: Any) -> dict[str, Any]:
    """One that the real LLaMA-Factory takes, too."""
    make, layout = DATA[stage]
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "rows.json").write_text(json.dumps([make(row) for row in ROWS]))
    (scratch / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", **layout}}))
    prompts = write_jsonl(scratch / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    return {
        "model_name_or_path": str(folder),
        "stage": stage,
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "rows",
        "dataset_dir": str(scratch),
        "template": "default",
        "cutoff_len": 128,
        "output_dir": str(scratch / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 7,
        "mlc": {"prompts": str(prompts), "weight": 10.0, "extractor_dim": 16},
        **options,
    }


def without_mlc(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "mlc"}


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(Path(config["output_dir"]) / "model.safetensors")


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def logged(config: dict[str, Any]) -> list[dict[str, float]]:
    state = json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "learning_rate" in row]


def run_exp(config: dict[str, Any]) -> None:
    from llamafactory.train.tuner import run_exp as run

    run(dict(config))


@pytest.mark.parametrize("stage", llamafactory.TRAINERS)
def test_each_stage_trains_with_the_loss(folder: Path, tmp_path: Path, stage: str) -> None:
    plain = configuration(folder, tmp_path / "plain", stage)
    run_exp(without_mlc(plain))
    off = configuration(folder, tmp_path / "off", stage)
    off["mlc"]["weight"] = 0
    llamafactory.train(off)
    config = configuration(folder, tmp_path / "on", stage)
    llamafactory.train(config)
    assert distance(weights(plain), weights(off)) == 0
    assert distance(weights(plain), weights(config)) > 1e-4
    assert all("mlc/loss" in row for row in logged(config))
    assert not any("mlc/loss" in row for row in logged(plain))


def test_accumulation_changes_nothing(folder: Path, tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        config = configuration(folder, tmp_path / str(batch), per_device_train_batch_size=batch)
        config |= {"gradient_accumulation_steps": accumulation}
        llamafactory.train(config)
        found.append(weights(config))
    assert distance(*found) < 2e-6  # sums in another order


def test_install_is_for_own_programs_and_can_be_undone(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path / "by_hand")
    undo = llamafactory.install(**config["mlc"])
    with pytest.raises(UserError, match="already"):
        llamafactory.install(**config["mlc"])
    run_exp(without_mlc(config))
    undo()
    plain = configuration(folder, tmp_path / "plain")
    run_exp(without_mlc(plain))
    same = configuration(folder, tmp_path / "by_command")
    llamafactory.train(same)
    assert distance(weights(config), weights(same)) == 0
    assert distance(weights(config), weights(plain)) > 1e-4


def test_the_trainer_is_still_one_of_llamafactory(folder: Path, tmp_path: Path) -> None:
    from llamafactory.train.kto import workflow
    from llamafactory.train.kto.trainer import CustomKTOTrainer

    undo = llamafactory.install(**configuration(folder, tmp_path, "kto")["mlc"])
    replaced = workflow.CustomKTOTrainer
    undo()
    assert issubclass(replaced, CustomKTOTrainer)
    assert replaced.__name__ == "CustomKTOTrainer"
    assert workflow.CustomKTOTrainer is CustomKTOTrainer


def test_a_run_that_does_not_train_reads_no_prompts(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, "sft", do_train=False)
    Path(config["mlc"]["prompts"]).write_text("{not json\n")
    llamafactory.train(config)
    with pytest.raises(UserError, match="prompts"):
        llamafactory.train(config | {"do_train": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlc": None}, "mlc: is missing"),
        ({"mlc": "prompts.jsonl"}, "mlc: must be a block"),
        ({"mlc": {"weight": 1}}, "mlc.prompts: is missing"),
        ({"mlc": {"prompts": "sample", "wieght": 1}}, "mlc.wieght: is no option; did you mean weight?"),
        ({"mlc": {"prompts": "sample", "weight": "much"}}, "mlc.weight: cannot be 'much'"),
        ({"mlc": {"prompts": "nowhere.jsonl"}}, "mlc.prompts: there is no file nowhere.jsonl"),
        ({"mlc": {"prompts": "sample", "weight": -1}}, "mlc.weight: "),
        ({"mlc": {"prompts": "sample", "temperature": 1000}}, "mlc.temperature: "),
        ({"mlc": {"prompts": "sample", "languages": ["en", "tlh"]}}, "mlc.languages: "),
        ({"stage": "rm"}, "stage: rm cannot have"),
        ({"stage": "ppo"}, "stage: ppo cannot have"),
        ({"use_ray": True}, "use_ray: "),
    ],
)
def test_faults_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    config = configuration(folder, tmp_path) | change
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert llamafactory.main(["train", str(file)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")
    assert not (Path(config["output_dir"]) / "model.safetensors").exists()


def test_faults_are_told_before_llamafactory_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.train import tuner

    def run(config: dict[str, Any]) -> None:
        pytest.fail("it loads the model")

    monkeypatch.setattr(tuner, "run_exp", run)
    config = configuration(folder, tmp_path)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": ROWS[0]["prompt"]}, {"text": "no prompt"}])
    for change, message in (
        ({"temperature": 1000}, r"^mlc.temperature: must be from 0.01 to 100"),
        ({"prompts": str(bad)}, r"bad.jsonl row 2: .prompt. must hold one text per language"),
    ):
        with pytest.raises(UserError, match=message):
            llamafactory.train(config | {"mlc": config["mlc"] | change})


@pytest.mark.parametrize("words", [["train"], ["chat", "x.yaml"], ["train", "--stage", "dpo"]])
def test_other_commands_get_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert llamafactory.main(words) == 2
    assert "usage: python -m lightning_mlc.plugins.llamafactory train" in capsys.readouterr().err


def test_environment_variables_of_other_backends_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_V1", "1")
    with pytest.raises(UserError, match="use_v1"):
        llamafactory.train(configuration(folder, tmp_path))


def test_a_missing_package_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["llamafactory", *(name for name in sys.modules if name.startswith("llamafactory."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install llamafactory"):
        llamafactory.train(configuration(folder, tmp_path))


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_command_on_two_processes_equals_one(folder: Path, tmp_path: Path) -> None:
    """As ``llamafactory-cli``, it starts ``torchrun``; options on the command line come after those of the file."""
    one = configuration(folder, tmp_path / "one")
    one["mlc"]["weight"] = 5.0
    llamafactory.train(one)
    two = configuration(folder, tmp_path / "two", per_device_train_batch_size=1, ddp_backend="gloo")
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(two))
    subprocess.run(
        [sys.executable, "-m", "lightning_mlc.plugins.llamafactory", "train", str(file), "mlc.weight=5.0"],
        check=True,
        cwd=ROOT,
        timeout=600,
        env=os.environ
        | {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
        | {"PYTHONPATH": os.pathsep.join(["kernels", *([] if INSTALLED else ["tests/stand_ins"])])},
    )
    assert distance(weights(one), weights(two)) < 2e-6
    assert torch.tensor([row["mlc/loss"] for row in logged(one)]).allclose(
        torch.tensor([row["mlc/loss"] for row in logged(two)]), atol=1e-5
    )
