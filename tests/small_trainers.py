"""Trainers of transformers on a small model, for tests of ``add_mlc``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SGD_ARGUMENTS, example_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lightning_mlc.plugins import add_mlc

ROWS = example_rows(10)
PROMPTS = [row["prompt"] for row in ROWS]


def arguments(out: Path, **options: Any) -> TrainingArguments:
    defaults = {**SGD_ARGUMENTS, "per_device_train_batch_size": 4, "seed": 7}
    return TrainingArguments(output_dir=str(out), **{**defaults, **options})


def trainer_of(folder: Path, out: Path, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(row["chosen"])["input_ids"][:24] for row in ROWS]
    data = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
    return kind(
        AutoModelForCausalLM.from_pretrained(folder),
        arguments(out, **options),
        train_dataset=data,
        eval_dataset=data[:4],
        processing_class=tokenizer,
    )


def add(trainer: Trainer, **options: Any) -> Trainer:
    return add_mlc(trainer, PROMPTS, **{"weight": 10.0, "extractor_dim": 16, "prompts_per_step": 4, **options})


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def trained(trainer: Trainer, **options: Any) -> Tensor:
    trainer.train(**options)
    return weights(trainer)


def logs_of(trainer: Trainer) -> list[dict[str, float]]:
    """What the trainer logged of its training steps."""
    return [logged for logged in trainer.state.log_history if "loss" in logged]
