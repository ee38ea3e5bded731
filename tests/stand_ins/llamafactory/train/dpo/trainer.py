from __future__ import annotations

from typing import Any

from transformers import Trainer

from ..trainer_utils import initialize


class CustomDPOTrainer(Trainer):
    def __init__(
        self,
        model: Any,
        ref_model: Any,
        finetuning_args: Any,
        processor: Any,
        disable_dropout: bool = True,
        **kwargs: Any,
    ) -> None:
        self.finetuning_args = finetuning_args
        self.ref_model = ref_model
        initialize(self, model=model, **kwargs)
