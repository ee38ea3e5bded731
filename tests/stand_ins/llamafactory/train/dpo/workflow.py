from __future__ import annotations

from typing import Any

from ..trainer_utils import run


def run_dpo(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, callbacks: Any = None) -> None:
    from .trainer import CustomDPOTrainer

    run(CustomDPOTrainer, model_args, training_args, callbacks, ref_model=None)
