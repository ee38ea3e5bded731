"""DPO of TRL: its trainer, collator and loss, with its defaults except for the settings that the variants share.

With the MLC loss in two ways: the plug-in, which has a backward pass of its own, and a sum of both losses in
``compute_loss``, which is what one would write without the plug-in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.published import Pair
from benchmarks.steps.settings import BETA, CLIP, EXTRACTOR_DIM, TEMPERATURE, WEIGHT, StepSettings
from benchmarks.steps.turns import Turns
from lightning_mlc.models.loading import dtype_of, load_causal_lm
from lightning_mlc.plugins import MLCRegularizer, add_mlc
from lightning_mlc.sources import load_tokenizer


def trl(settings: StepSettings, planned: list[list[Pair]], turns: Turns) -> None:
    """TRL without the MLC loss."""
    _train(settings, planned, turns, lambda trainer: None)


def trl_mlc(settings: StepSettings, planned: list[list[Pair]], turns: Turns) -> None:
    """TRL with the plug-in."""
    _train(settings, planned, turns, lambda trainer: add_mlc(trainer, settings.data, **mlc_options(settings)))


def trl_mlc_sum(settings: StepSettings, planned: list[list[Pair]], turns: Turns) -> None:
    """TRL with the MLC loss added in ``compute_loss``, so that the graphs of both are in memory together."""

    def add(trainer: Any) -> None:
        mlc = MLCRegularizer(settings.data, trainer.processing_class, **mlc_options(settings))

        class Sum(type(trainer)):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
                added = mlc.loss(model, self.state.global_step)
                return super().compute_loss(model, inputs, *arguments, **keywords) + added

        trainer.__class__ = Sum

    _train(settings, planned, turns, add)


def mlc_options(settings: StepSettings) -> dict[str, Any]:
    """Options of the MLC loss: a frozen extractor, and as many prompts in a step as pairs."""
    return {
        "languages": settings.languages,
        "source_language": settings.languages[0],
        "weight": WEIGHT,
        "temperature": TEMPERATURE,
        "extractor": "frozen",
        "extractor_dim": EXTRACTOR_DIM,
        "prompts_per_step": settings.batch_size,
        "max_prompt_length": settings.max_prompt_length,
        "seed": settings.seed,
    }


def _train(settings: StepSettings, planned: list[list[Pair]], turns: Turns, add: Callable[[Any], object]) -> None:
    """Take the timed steps, then the counted ones. ``add`` changes the trainer before."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[torch.Tensor] = []

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # already tokenised

    class OnRequest(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.ready()
            turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.end(tuple(pair.id for pair in planned[state.global_step - 1]), losses[-1])
            if state.global_step < len(planned):
                turns.begin()

    class Counted(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stack = ExitStack()
            if state.global_step >= settings.warm_up:
                self.stack.enter_context(turns.counting())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.stack.close()

    dtype = dtype_of(settings.precision)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = load_causal_lm(settings.model, dtype)
        model.is_quantized = False  # the Trainer refuses quantised weights, but those of a GGUF file were dequantised
        trainer: Any = Tokenised(
            model,
            ref_model=load_causal_lm(settings.model, dtype),
            args=DPOConfig(**_options(settings, folder), max_steps=len(planned)),
            train_dataset=Dataset.from_dict(_columns(planned)),
            processing_class=load_tokenizer(settings.model),
            callbacks=[OnRequest()],
        )
        add(trainer)
        trainer.__class__ = _recording(type(trainer), losses)
        trainer.train()
        turns.rest()
        trainer.pop_callback(OnRequest)
        trainer.add_callback(Counted())
        trainer.args.max_steps = settings.warm_up + settings.counted_steps
        if settings.counted_steps:
            trainer.train()


def _recording(kind: Any, losses: list[torch.Tensor]) -> Any:
    """A subclass of ``kind`` that notes the loss of each step: the one that the trainer logs."""

    class Recording(kind):  # type: ignore[misc]
        def training_step(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().training_step(*arguments, **keywords)
            losses.append(loss.detach())
            return loss

    return Recording


def _columns(planned: list[list[Pair]]) -> dict[str, list[Any]]:
    pairs = [pair for step in planned for pair in step]
    return {
        "prompt_ids": [pair.prompts[0] for pair in pairs],
        "chosen_ids": [pair.chosen for pair in pairs],
        "rejected_ids": [pair.rejected for pair in pairs],
    }


def _options(settings: StepSettings, folder: str) -> dict[str, Any]:
    """Return the options of ``DPOConfig``."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": settings.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "weight_decay": 0.0,
        "beta": BETA,
        "bf16": settings.precision == "bf16-mixed",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings.seed,
        "use_cpu": settings.device == "cpu",
    }
