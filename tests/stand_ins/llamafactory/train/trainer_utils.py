"""What the four workflows and trainers have in common here."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer


def run(kind: Any, model_args: Any, training_args: Any, callbacks: list[Any], **more: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    texts = [row.get("chosen") or row.get("output") or row["text"] for row in model_args.rows]
    ids = [tokenizer(text)["input_ids"][:24] for text in texts]
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path),
        args=training_args,
        finetuning_args=model_args,
        callbacks=callbacks,
        train_dataset=[{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids],
        tokenizer=tokenizer,
        processor=None,
        **more,
    )
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()


def initialize(trainer: Trainer, **keywords: Any) -> None:
    """LLaMA-Factory's trainers go past TRL's ``__init__``, too."""
    keywords["processing_class"] = keywords.pop("tokenizer")
    Trainer.__init__(trainer, **keywords)
