"""The plug-in adds no wait for the device to somebody else's step; where values are logged, it adds one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SGD_ARGUMENTS, example_rows, save_model
from device_waits import DEVICE, OPERATOR, DeviceWaits, Wait
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lightning_mlc.data.rows import NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.plugins import MLCRegularizer, add_mlc
from lightning_mlc.plugins.lightning import MLCModuleMixin

PROMPTS = [row["prompt"] for row in example_rows(12)]
OPTIONS: dict[str, Any] = {"weight": 10.0, "extractor_dim": 16, "prompts_per_step": 4, "center": True}
THEIRS = (" training_step", " train", " get_batch_samples")
"""Ends of the lines of ours that call the trainer's own methods."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.0)


@pytest.fixture
def waits() -> DeviceWaits:
    # The model is on the device `cpu`, because tensors do not keep another name.
    return DeviceWaits(torch.device("cpu"))


def of_the_plugin(waits: DeviceWaits) -> list[Wait]:
    others = (OPERATOR, Path(__file__).name)
    return [w for w in waits.found if "lightning_mlc/" in w.where and not any(part in w.where for part in others)]


def regularizer(folder: Path, **options: Any) -> MLCRegularizer:
    return MLCRegularizer(PROMPTS, AutoTokenizer.from_pretrained(folder), **{**OPTIONS, **options})


@pytest.mark.parametrize("extractor", ["frozen", "linear"])
def test_a_loop_of_ones_own(extractor: str, folder: Path, waits: DeviceWaits) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlc = regularizer(folder, extractor=extractor)
    mlc.loss(model, 0)  # looks at the model, and checks how it can be run
    mlc.metrics()
    waits.put(model, mlc)
    with waits:
        for step in (1, 2):
            for micro_batch in (0, 1):
                mlc.loss(model, step, micro_batch=micro_batch, micro_batches=2).backward()
        assert of_the_plugin(waits) == []
        logged = mlc.metrics()
    assert [wait.operation for wait in waits.found if OPERATOR not in wait.where] == ["tolist"]
    assert logged["mlc/loss"] > 0


def test_rows_are_sent_without_waiting() -> None:
    rows = TokenRows.pad([TokenSequence((1, 2), (), 0, 0, NO_RESPONSE)], 0)
    with DeviceWaits() as waits:
        sent = rows.sent_to(DEVICE)
    assert waits.found == []
    assert waits.holds(sent.input_ids)


def test_a_trainer_of_transformers(folder: Path, tmp_path: Path, waits: DeviceWaits) -> None:
    """Two micro-batches in a step. The Trainer itself looks at its losses, which is not counted here."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4} for _ in range(16)]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 2}
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(folder),
        TrainingArguments(output_dir=str(tmp_path), **{**SGD_ARGUMENTS, **options}),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    add_mlc(trainer, PROMPTS, **OPTIONS)
    trainer.mlc.loss(trainer.model, 0)
    trainer.mlc.metrics()
    waits.put(trainer.model, trainer.mlc)
    with waits:
        trainer.train()
    found = [wait for wait in of_the_plugin(waits) if not wait.where.endswith(THEIRS)]
    assert [wait.operation for wait in found] == ["tolist"] * 2, found  # once for each line of the log
    assert all("logged_means.py" in wait.where for wait in found)


class Theirs(LightningModule):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(128).view(16, 8), batch_size=2)  # type: ignore[arg-type]


class WithMLC(MLCModuleMixin, Theirs):
    pass


def test_a_lightning_module(folder: Path, tmp_path: Path) -> None:
    waits = DeviceWaits()
    module = WithMLC(folder)
    module.mlc = regularizer(folder)
    module.mlc.loss(module.model, 0)
    module.mlc.metrics()
    trainer = LightningTrainer(
        accelerator="cpu",
        strategy=SingleDeviceStrategy(device=DEVICE),
        default_root_dir=tmp_path,
        max_steps=4,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    waits.put(module)
    with waits:
        trainer.fit(module)
    found = of_the_plugin(waits)
    assert [wait.operation for wait in found] == ["tolist"] * 2, found
    assert trainer.callback_metrics["mlc/loss"] > 0
