"""DPO and DPO + MLC of this project: the command ``lightning-mlc fit``, with a callback that waits before each step.

The timed step is the one that users run: it includes loading and collating the batch, and logging.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from benchmarks.published import Pair
from benchmarks.steps.settings import BETA, CLIP, EXTRACTOR_DIM, TEMPERATURE, WEIGHT, StepSettings
from benchmarks.steps.turns import Turns
from lightning_mlc.commands.training import TrainingCLI, make_cli


def dpo(settings: StepSettings, planned: list[list[Pair]], turns: Turns) -> None:
    """DPO of this project, without the consistency term."""
    _train(settings, 0.0, turns, extractor=None)


def dpo_mlc(settings: StepSettings, planned: list[list[Pair]], turns: Turns) -> None:
    """DPO + MLC of this project."""
    _train(settings, WEIGHT, turns, settings.extractor)


def _train(settings: StepSettings, weight: float, turns: Turns, extractor: str | None) -> None:
    """Take the timed steps, then the counted ones.

    Args:
        settings: Settings that all variants share.
        weight: Weight of the MLC loss.
        turns: The worker's end of the pipe.
        extractor: File to write the initial extractor to, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = settings.warm_up + settings.steps
        _fit(_arguments(settings, weight, Path(folder) / "timed", steps), OnRequest(turns, extractor))
        turns.rest()
        if settings.counted_steps:
            steps = settings.warm_up + settings.counted_steps
            _fit(_arguments(settings, weight, Path(folder) / "counted", steps), Counted(turns, settings.warm_up))


def _fit(arguments: list[str], callback: Callback) -> None:
    """Run the command with an additional callback."""

    class WithCallback(TrainingCLI):
        def make_trainer(self, options: dict[str, Any], callbacks: list[Callback]) -> Trainer:
            return super().make_trainer(options, [*callbacks, callback])

    make_cli(arguments, WithCallback)


class OnRequest(Callback):
    """Makes training wait until the next step is requested."""

    def __init__(self, turns: Turns, extractor: str | None) -> None:
        self._turns = turns
        self._extractor = extractor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._extractor is not None:
            own: dict[str, torch.Tensor] = {}
            for name, parameter in pl_module.named_parameters():
                if "extractor." in name:
                    own[name.rpartition(".")[2]] = parameter.detach()
            save_file(own, self._extractor)
        self._turns.ready()
        self._turns.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._turns.end(batch.ids, outputs["loss"])
        if trainer.global_step < trainer.max_steps:
            self._turns.begin()


class Counted(Callback):
    """Counts the FLOPs and positions of the steps after the warm-up."""

    def __init__(self, turns: Turns, warm_up: int) -> None:
        self._turns = turns
        self._warm_up = warm_up
        self._stack = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self._warm_up:
            self._stack.enter_context(self._turns.counting())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stack.close()


def _arguments(settings: StepSettings, weight: float, out: Path, steps: int) -> list[str]:
    """Return the arguments of ``lightning-mlc fit`` for the published settings."""
    options = {
        "out": out,
        "seed_everything": settings.seed,
        "trainer.accelerator": "gpu" if settings.device == "cuda" else settings.device,
        "trainer.devices": 1,
        "trainer.precision": settings.precision,
        "trainer.max_steps": steps,
        "trainer.gradient_clip_val": CLIP,
        "trainer.enable_progress_bar": "false",
        "checkpoint.save_top_k": 0,
        "checkpoint.save_last": "false",
        "model.name_or_path": settings.model.name_or_path,
        "model.gguf_file": settings.model.gguf_file or "null",
        "model.objective": "DPO",
        "model.objective.beta": BETA,
        "model.consistency.mlc.weight": weight,
        "model.consistency.mlc.temperature": TEMPERATURE,
        "model.consistency.layer": -1,
        "model.consistency.extractor": "linear",
        "model.consistency.extractor_dim": EXTRACTOR_DIM,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": settings.learning_rate,
        "model.optimizer.weight_decay": 0.0,
        "model.gradient_checkpointing": str(settings.gradient_checkpointing).lower(),
        "data.train_path": settings.data,
        "data.languages": f"[{','.join(settings.languages)}]",
        "data.source_language": settings.languages[0],
        "data.val_share": 0.0,
        "data.batch_size": settings.batch_size,
        "data.max_prompt_length": settings.max_prompt_length,
        "data.max_response_length": settings.max_response_length,
    }
    return ["fit", *(f"--{key}={value}" for key, value in options.items()), *(f"--{o}" for o in settings.overrides)]
