from __future__ import annotations

from typing import Any

from transformers import Trainer

from ..trainer_utils import initialize


class CustomTrainer(Trainer):
    def __init__(self, finetuning_args: Any, processor: Any, model_args: Any = None, **kwargs: Any) -> None:
        initialize(self, **kwargs)
        self.finetuning_args = finetuning_args
