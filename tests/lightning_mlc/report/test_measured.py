"""A run's measurements are found in its checkpoint, whatever class recorded them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_mlc.report.measured import measured_in
from lightning_mlc.training.callbacks import EvaluationReport

LATEST = {"step": 3, "results": {"val/nll/en": 2.5}}


class Own(EvaluationReport):
    """A subclass that a user might write to record more."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.latest = {"val/nll/en": 3.0}, LATEST

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Do nothing, because the module is not the project's."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing."""


def test_a_subclass_leaves_its_results_where_the_card_looks_for_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "logger": False}
    silent: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**options, **silent, callbacks=[Own()], enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    found = measured_in(torch.load(tmp_path / "own.ckpt", weights_only=True))
    assert found == {"before": {"val/nll/en": 3.0}, "before_cosines": None, "latest": LATEST}


def test_checkpoints_of_earlier_versions_and_of_others() -> None:
    state = {"before": None, "before_cosines": None, "latest": LATEST}
    assert measured_in({"callbacks": {"EvaluationReport": state}}) == state
    assert measured_in({"callbacks": {"Progress": {}}}) is None
    assert measured_in({}) is None
