"""docs/plugins.md: every block of code runs as it stands there, and does what the text says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import example_rows, save_model, write_jsonl
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import MLCRegularizer, add_mlc

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- code: (\w+) -->\n```\w+\n(.*?)```", PAGE, flags=re.S))
ROWS = example_rows(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.0)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page names, in which the block runs."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


def write_files(folder: Path) -> None:
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    write_jsonl(folder / "pairs.jsonl", ROWS)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train()


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def run(name: str, changes: dict[str, str] | None = None, **names: Any) -> dict[str, Any]:
    """Run a block, in which ``names`` are known, and return what it defines."""
    text = BLOCKS[name]
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    exec(compile(text, f"docs/plugins.md: {name}", "exec"), names)
    return names


def test_every_block_is_run_here() -> None:
    """But for shell commands, which others look at (tests/test_readme.py)."""
    blocks = re.findall(r"```(\w+)\n", PAGE)
    assert len(BLOCKS) == len([kind for kind in blocks if kind != "bash"])
    assert {f'"{name}"' for name in BLOCKS} <= set(re.findall(r'"\w+"', Path(__file__).read_text(encoding="utf-8")))


# ---- trainers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trl", "dataset", "subclass"])
def test_blocks_with_trl(name: str, folder: Path, scratch: Path) -> None:
    trl = pytest.importorskip("trl")
    from lightning_mlc.plugins import mlc_dataset

    args = trl.DPOConfig(
        "out", max_steps=2, logging_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no"
    )
    pairs = mlc_dataset("pairs.jsonl")
    known = {"model": model_of(folder), "tokenizer": tokenizer_of(folder), "args": args, "pairs": pairs}
    trainer = run(name, DPOTrainer=trl.DPOTrainer, **known)["trainer"]
    if name == "dataset":
        trainer.train()
    assert isinstance(trainer, trl.DPOTrainer)
    logs = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert len(logs) == 2
    named = set(re.findall(r"`(mlc/\w+)`", PAGE))
    assert len(named) == 5
    assert all(named <= row.keys() for row in logs)


def test_the_file_that_the_page_shows(folder: Path, scratch: Path) -> None:
    Path("prompts.jsonl").write_text(BLOCKS["prompts"], encoding="utf-8")
    mlc = MLCRegularizer("prompts.jsonl", tokenizer_of(folder))
    assert mlc.groups.languages == ("en", "sw", "zh")


def test_the_defaults_that_the_page_gives(folder: Path, scratch: Path) -> None:
    mlc = MLCRegularizer("prompts.jsonl", tokenizer_of(folder))
    said = dict(re.findall(r"^\| `(\w+)` \| `?([\w.-]+)`? \|", PAGE, flags=re.M))
    settings = mlc.settings
    assert float(said["weight"]) == mlc.weight
    assert float(said["layer"]) == settings.layer
    assert int(said["every_n_steps"]) == settings.every_n_steps
    assert said["extractor"] == settings.extractor
    assert int(said["max_prompt_length"]) == MLCRegularizer.__init__.__kwdefaults__["max_prompt_length"]


# ---- frameworks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["axolotl", "llamafactory"])
def test_blocks_of_configurations(name: str, scratch: Path) -> None:
    pytest.importorskip("pydantic")
    from lightning_mlc.plugins.options import checked

    assert checked(yaml.safe_load(BLOCKS[name])["mlc"]) == {"prompts": "prompts.jsonl", "weight": 0.8}


def test_block_for_programs_that_call_llamafactory(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic")
    monkeypatch.syspath_prepend(ROOT / "tests" / "stand_ins")
    import llamafactory.train.tuner as tuner

    seen: list[type] = []

    def note(config: dict[str, str]) -> None:
        from llamafactory.train.sft.workflow import CustomSeq2SeqTrainer

        seen.append(CustomSeq2SeqTrainer)

    monkeypatch.setattr(tuner, "run_exp", note)
    try:
        run("install", config={})
        assert seen[0].mlc_block == {"prompts": "prompts.jsonl", "weight": 0.8}  # type: ignore[attr-defined]
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == "llamafactory"]:
            del sys.modules[module]


def test_block_for_a_lightning_module(folder: Path, scratch: Path) -> None:
    from lightning.pytorch import LightningModule

    class YourModule(LightningModule):
        def __init__(self, _: Any) -> None:
            super().__init__()
            self.model = model_of(folder)

        def training_step(self, batch: Tensor) -> Tensor:
            loss: Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return DataLoader(torch.arange(12)[None] + torch.arange(16)[:, None])

    found = run("lightning", {"max_steps=100": "max_steps=2"}, YourModule=YourModule, tokenizer=tokenizer_of(folder))
    assert found["module"].trainer.global_step == 2
    assert "mlc/loss" not in found["module"].trainer.callback_metrics  # logged every 50th step
    assert float((weights(found["module"].model) - weights(model_of(folder))).abs().max()) > 1e-4


# ---- loops ------------------------------------------------------------------------------------------


def batches_of(size: int, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """Three optimizer steps of four rows; a process has every second row."""
    rows = torch.randint(0, 256, (12, 10), generator=torch.Generator().manual_seed(0))
    return list(rows[rank::world_size].split(size))


def objective(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


TRAINED: dict[str, Any] = {"extractor": "linear", "every_n_steps": 2, "extractor_dim": 16, "prompts_per_step": 1}
"""A trained extractor, on steps without the loss, and with a process that has no prompt."""


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    # With momentum, a gradient of 0 is not the same as none.
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


def plain_steps(folder: Path, mlc: bool = True, trained: bool = False) -> Tensor:
    """The same training in its simplest form: whole steps, one backward pass for the sum."""
    model = model_of(folder)
    optimizer = optimizer_of(model)
    options = {"prompts_per_step": 8, **(TRAINED if trained else {})}
    regularizer = MLCRegularizer("prompts.jsonl", tokenizer_of(folder), weight=0.8, **options)
    regularizer.prepare(model)
    if trained:
        optimizer.add_param_group({"params": [*regularizer.parameters()]})
    for step, batch in enumerate(batches_of(4)):
        loss = objective(model, batch)
        (loss + regularizer.loss(model, step) if mlc else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([weights(model), weights(regularizer)]) if trained else weights(model)


def with_accelerate(folder: Path, size: int, accumulation: int) -> Tensor:
    """Weights after the block for accelerate, on this process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = model_of(folder)
    # accelerate gives batch by batch to the processes in turn.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [batches_of(size, rank, world_size) for rank in range(world_size)]
    in_turn = [batch for turn in zip(*rows, strict=True) for batch in turn]
    names = {
        "model": model,
        "tokenizer": tokenizer_of(folder),
        "optimizer": optimizer_of(model),
        "batches": DataLoader(torch.cat(in_turn), batch_size=size),
        "objective": objective,
    }
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run("accelerate", {"gradient_accumulation_steps=4": f"gradient_accumulation_steps={accumulation}"}, **names)
    return weights(model)


def with_pytorch(
    folder: Path, size: int, accumulation: int, rank: int, world_size: int, trained: bool = False
) -> Tensor:
    """Weights after the block for plain PyTorch, then those of a trained extractor, if it has one."""
    batches = batches_of(size, rank, world_size)
    model = model_of(folder)
    changes = {}
    if trained:
        changes["prompts_per_step=8)\n"] = (
            "**options)\nmlc.prepare(model)\noptimizer.add_param_group({'params': [*mlc.parameters()]})\n"
        )
    found = run(
        "pytorch",
        changes,
        options=TRAINED,
        model=model,
        tokenizer=tokenizer_of(folder),
        optimizer=optimizer_of(model),
        steps=[batches[start : start + accumulation] for start in range(0, len(batches), accumulation)],
        objective=objective,
        rank=rank,
        world_size=world_size,
    )
    return torch.cat([weights(model), weights(found["mlc"])]) if trained else weights(model)


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (1, 4)])
def test_block_for_accelerate(size: int, accumulation: int, folder: Path, scratch: Path) -> None:
    pytest.importorskip("accelerate")
    expected = plain_steps(folder)
    torch.testing.assert_close(with_accelerate(folder, size, accumulation), expected, rtol=0, atol=1e-6)
    assert float((plain_steps(folder, mlc=False) - expected).abs().max()) > 1e-4


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (1, 4)])
def test_block_for_plain_pytorch(size: int, accumulation: int, folder: Path, scratch: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch / 'meet'}", rank=0, world_size=1)
    try:
        found = with_pytorch(folder, size, accumulation, 0, 1)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, plain_steps(folder), rtol=0, atol=1e-6)


TWO = """
import os, sys
sys.path[:0] = {path!r}
from test_documentation import *

folder, rank = Path({folder!r}), int(os.environ["RANK"])
results = {{"accelerate": with_accelerate(folder, 1, 2)}}
results["pytorch"] = with_pytorch(folder, 1, 2, rank, 2)
results["trained"] = with_pytorch(folder, 1, 2, rank, 2, trained=True)
torch.save(results, f"results{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_loops_on_two_processes_equal_one(folder: Path, scratch: Path) -> None:
    pytest.importorskip("accelerate")
    path = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / "kernels"), str(ROOT)]
    Path("two.py").write_text(TWO.format(path=path, folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "two.py"]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    for rank in (0, 1):
        for name, found in torch.load(f"results{rank}.pt").items():
            expected = plain_steps(folder, trained=name == "trained")
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# ---- errors -----------------------------------------------------------------------------------------


def test_messages_begin_as_the_page_says(folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("pydantic")
    from lightning_mlc.plugins.options import checked

    def trainer() -> Trainer:
        args = TrainingArguments("out", use_cpu=True, report_to=[])
        return Trainer(model_of(folder), args, processing_class=tokenizer_of(folder))

    without_template = tokenizer_of(folder)
    without_template.chat_template = None
    begun, two, replaced = trainer(), trainer(), trainer()
    without_tokenizer = Trainer(model_of(folder), begun.args)
    one_language, two_languages = scratch / "one.jsonl", scratch / "two.jsonl"
    one_language.write_text(json.dumps({"prompt": {"en": "Hello"}}))
    two_languages.write_text("\n".join(json.dumps({"prompt": {code: "Hi"}}) for code in ("en", "sw")))
    replaced.train_dataset = [{"input_ids": [5, 6], "labels": [5, 6]}] * 20
    replaced.training_step = lambda *_: torch.zeros(())
    begun.state.global_step = 1
    two.args._n_gpu = 2
    faults = [
        lambda: add_mlc(trainer(), one_language),
        lambda: add_mlc(trainer(), two_languages),
        lambda: add_mlc(without_tokenizer, "prompts.jsonl"),
        lambda: add_mlc(trainer(), "prompts.jsonl", tokenizer=without_template),
        lambda: add_mlc(two, "prompts.jsonl"),
        lambda: add_mlc(begun, "prompts.jsonl"),
        lambda: add_mlc(add_mlc(trainer(), "prompts.jsonl"), "prompts.jsonl"),
        lambda: checked({"prompts": "prompts.jsonl", "wieght": 1}),
        lambda: add_mlc(replaced, "prompts.jsonl").train(),
    ]
    messages = []
    for fault in faults:
        with pytest.raises(UserError) as error:
            fault()
        messages.append(str(error.value).replace("mlc.wieght", "mlc.NAME"))
    messages = [re.sub(r"^\S+/(one|two)\.jsonl", "prompts.jsonl", message) for message in messages]
    said = re.findall(r"^\| `([\w.]+: [^`]+)` \|", PAGE, flags=re.M)
    assert len(said) == len(faults)
    assert [message for begin, message in zip(said, messages, strict=True) if not message.startswith(begin)] == []
