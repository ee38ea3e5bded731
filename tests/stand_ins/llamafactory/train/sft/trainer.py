from __future__ import annotations

from typing import Any

from transformers import Seq2SeqTrainer


class CustomSeq2SeqTrainer(Seq2SeqTrainer):
    def __init__(
        self,
        finetuning_args: Any,
        processor: Any,
        model_args: Any = None,
        gen_kwargs: dict[str, Any] | None = None,
        ref_model: Any = None,
        **kwargs: Any,
    ) -> None:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
        self.finetuning_args = finetuning_args
