from __future__ import annotations

from typing import Any

from ..trainer_utils import run
from .trainer import CustomKTOTrainer


def run_kto(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, callbacks: Any = None) -> None:
    run(CustomKTOTrainer, model_args, training_args, callbacks, ref_model=None)
