"""DPO + MLC through TRL with the plug-in, against the product's own step: same model, rows, extractor and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATE, example_rows, save_model, write_jsonl
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mlc.consistency import MLC, Consistency
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.objectives import DPO
from lightning_mlc.plugins import add_mlc, mlc_dataset
from lightning_mlc.training.module import AlignmentModule

trl = pytest.importorskip("trl")

STEPS, RATE, WEIGHT, BETA = 5, 1e-3, 5.0, 0.3
ROWS = example_rows(4)


class Ours(AlignmentModule):
    """Starts with a given extractor, and keeps the losses of each step."""

    given: dict[str, Tensor]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.kept: dict[str, list[float]] = {"train/loss": [], "train/mlc/loss": []}
        if self.given:
            assert self.representation is not None
            self.representation.load_state_dict(self.given)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        for name, losses in self.kept.items():
            losses.append(float(self.trainer.callback_metrics[name]))


@pytest.mark.parametrize("extractor", ["frozen", "none"])
@pytest.mark.parametrize("layer", [-1, 0.5])
def test_five_steps_are_the_same(extractor: Any, layer: int | float, tmp_path: Path) -> None:
    # TRL also trains on what the template writes after the end of the response, such as this line break. The product
    # does not, because the model never generates it. Apart from that, the losses are the same.
    folder = save_model(tmp_path / "model", template=TEMPLATE.replace("<|end|>\n", "<|end|>"))
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=BETA,
        per_device_train_batch_size=len(ROWS),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    theirs = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        train_dataset=mlc_dataset(file),
        processing_class=tokenizer,
    )
    add_mlc(theirs, file, weight=WEIGHT, extractor=extractor, extractor_dim=16, layer=layer)
    assert theirs.mlc.prompts_per_step == len(ROWS)
    start = {name: value.clone() for name, value in theirs.mlc.representation.state_dict().items()}
    theirs.train()
    logs = [found for found in theirs.state.log_history if "loss" in found]

    ours = Ours(
        str(folder),
        DPO(beta=BETA),
        Consistency(mlc=MLC(weight=WEIGHT), extractor=extractor, extractor_dim=16, layer=layer),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0),
    )
    ours.given = start
    data = MultilingualData(str(file), val_share=0.0, batch_size=len(ROWS), name_or_path=str(folder))
    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        use_distributed_sampler=False,
        logger=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **quiet,
    ).fit(ours, data)

    assert ours.kept["train/mlc/loss"] == pytest.approx([found["mlc/loss"] for found in logs], abs=1e-5)
    assert ours.kept["train/loss"] == pytest.approx([found["loss"] for found in logs], abs=1e-5)
