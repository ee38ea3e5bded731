from __future__ import annotations

from typing import Any

from ..trainer_utils import run
from .trainer import CustomTrainer


def run_pt(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, callbacks: Any = None) -> None:
    run(CustomTrainer, model_args, training_args, callbacks)
