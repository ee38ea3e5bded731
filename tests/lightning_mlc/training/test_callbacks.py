"""What callbacks add to Lightning's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_mlc.training.callbacks import ValidateAtMaxSteps


class ValidatedAt(Callback):
    """Keeps the steps after which the model was validated."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)


def fit(folder: Path, max_steps: int, *callbacks: Callback, ckpt_path: Path | None = None) -> Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "limit_train_batches": 5,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_steps=max_steps, callbacks=list(callbacks), default_root_dir=folder, **options)
    trainer.fit(BoringModel(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize(("max_steps", "validated"), [(2, [2]), (5, [5]), (7, [5, 7])])
def test_the_last_step_is_validated_once(tmp_path: Path, max_steps: int, validated: list[int]) -> None:
    found = ValidatedAt()
    fit(tmp_path, max_steps, ValidateAtMaxSteps(), found)
    assert found.steps == validated


def test_lightning_alone_ends_without(tmp_path: Path) -> None:
    found = ValidatedAt()
    fit(tmp_path, 2, found)
    assert found.steps == []


def test_a_checkpoint_from_before_this_callback_is_continued(tmp_path: Path) -> None:
    fit(tmp_path, 2).save_checkpoint(tmp_path / "old.ckpt")
    found = ValidatedAt()
    trainer = fit(tmp_path, 4, ValidateAtMaxSteps(), found, ckpt_path=tmp_path / "old.ckpt")
    assert found.steps == [4]
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    assert torch.load(tmp_path / "new.ckpt", weights_only=True)["callbacks"] == {}
