"""The plug-in of Axolotl: in the real one where it is installed, elsewhere in one that stands in for it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, save_model, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import add_mlc

pytest.importorskip("accelerate")
pytest.importorskip("pydantic")

ROOT = Path(__file__).parents[3]
PLUGIN = "lightning_mlc.plugins.axolotl.MLCPlugin"
ROWS = example_rows(8)
INSTALLED = importlib.util.find_spec("axolotl") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.0)


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not INSTALLED:
        monkeypatch.syspath_prepend(ROOT / "tests" / "stand_ins")
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.pop(PLUGIN, None)
    yield
    PluginManager.get_instance().plugins.pop(PLUGIN, None)
    if not INSTALLED:
        for name in [name for name in sys.modules if name.split(".")[0] == "axolotl"]:
            del sys.modules[name]
        sys.modules.pop("lightning_mlc.plugins.axolotl", None)


def configuration(**options: Any) -> Any:
    from axolotl.utils.dict import DictDefault

    base = {
        "base_model": "model",
        "datasets": [{"path": "data", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.1,
        "num_epochs": 1,
        "plugins": [PLUGIN],
    }
    return DictDefault({name: value for name, value in (base | options).items() if value is not None})


def loaded(cfg: Any) -> Any:
    """What ``axolotl train`` makes of a configuration before it loads a model."""
    from axolotl.utils.config import prepare_plugins, validate_config

    prepare_plugins(cfg)
    return validate_config(cfg)


def trainer_of(folder: Path, out: Path) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(row["chosen"])["input_ids"][:24] for row in ROWS]
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=7,
    )
    return Trainer(
        AutoModelForCausalLM.from_pretrained(folder),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids],
        processing_class=tokenizer,
    )


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def created(cfg: Any, trainer: Trainer) -> Trainer:
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().post_trainer_create(cfg, trainer)
    return trainer


def test_the_block_reaches_the_trainer(folder: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    options = {"weight": 10.0, "extractor_dim": 16, "languages": ["en", "sw"]}
    cfg = loaded(configuration(mlc={"prompts": str(prompts), **options}))
    trainer = created(cfg, trainer_of(folder, tmp_path))
    by_hand = add_mlc(trainer_of(folder, tmp_path), str(prompts), **options)
    plain = trainer_of(folder, tmp_path)
    for one in (trainer, by_hand, plain):
        one.train()
    assert torch.equal(weights(trainer), weights(by_hand))
    assert (weights(trainer) - weights(plain)).abs().max() > 1e-4
    # Defaults that depend on the trainer are left to it.
    assert trainer.mlc.prompts_per_step == 4
    assert trainer.mlc.seed == 7


def test_a_later_configuration_without_the_block_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Axolotl keeps plug-ins as long as its process lives."""
    loaded(configuration(mlc={"prompts": "sample"}))
    later = loaded(configuration(plugins=None))
    assert type(created(later, trainer_of(folder, tmp_path))) is Trainer


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, "mlc: is missing"),
        ("prompts.jsonl", "mlc: must be a block"),
        ({"weight": 1}, "mlc.prompts: is missing"),
        ({"prompts": "sample", "tempratur": 1}, "mlc.tempratur: is no option; did you mean temperature?"),
        ({"prompts": "sample", "prompts_per_step": "all"}, "mlc.prompts_per_step: cannot be 'all'"),
        ({"prompts": "nowhere.jsonl"}, "mlc.prompts: there is no file nowhere.jsonl"),
        ({"prompts": "sample", "temperature": 1000}, "mlc.temperature: must be from 0.01 to 100, got 1000"),
        ({"prompts": "sample", "weight": -1}, "mlc.weight: must be 0 or above, got -1"),
        ({"prompts": "sample", "layer": "auto"}, "mlc.layer: auto is an option of `lightning-mlc fit`"),
        ({"prompts": "sample", "scale": "both"}, "mlc.scale: cannot be 'both'"),
        ({"prompts": "sample", "layer": 1.5}, "mlc.layer: 1.5 is not a fraction of depth"),
        ({"prompts": "sample", "extractor_dim": 1}, "mlc.extractor_dim: must be at least 2, got 1"),
        ({"prompts": "sample", "languages": ["en", "tlh"]}, "mlc.languages: no row has a prompt in 'tlh'"),
        ({"prompts": "sample", "source_language": "x"}, "mlc.source_language: 'x' is not a language code"),
    ],
)
def test_faults_stop_axolotl_before_it_loads_the_model(block: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        loaded(configuration(mlc=block))
    assert str(error.value).startswith(message)


def test_the_schema_refuses_unknown_options_too() -> None:
    """Because values of the command line come after the file."""
    from axolotl.utils.config import validate_config

    cfg = configuration(mlc={"prompts": "sample"})
    loaded(cfg)
    cfg["mlc"]["wieght"] = 1
    with pytest.raises(ValueError, match=r"mlc\.wieght"):
        validate_config(cfg)


def test_a_fault_in_the_prompts_stops_axolotl_before_it_loads_the_model(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": ROWS[0]["prompt"]}, {"text": "no prompt"}])
    with pytest.raises(UserError, match=r"prompts.jsonl row 2: .prompt. must hold one text per language"):
        loaded(configuration(mlc={"prompts": str(prompts)}))


def test_faults_in_what_the_command_line_adds_are_named_as_in_the_file(folder: Path, tmp_path: Path) -> None:
    cfg = loaded(configuration(mlc={"prompts": "sample"}))
    cfg["mlc"]["temperature"] = 1000.0
    with pytest.raises(UserError, match=r"^mlc\.temperature: "):
        created(cfg, trainer_of(folder, tmp_path))


def test_without_axolotl_the_error_says_so() -> None:
    code = "import sys; sys.modules['axolotl'] = None; import lightning_mlc.plugins.axolotl"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": "kernels"}, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].endswith("which is not installed: pip install axolotl")
