from __future__ import annotations

from typing import Any

from ..trainer_utils import run
from .trainer import CustomSeq2SeqTrainer


def run_sft(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any,
    callbacks: Any = None,
) -> None:
    run(CustomSeq2SeqTrainer, model_args, training_args, callbacks)
