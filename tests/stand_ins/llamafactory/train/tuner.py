from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainerCallback

from ..hparams import read_args
from .dpo import run_dpo
from .kto import run_kto
from .pt import run_pt
from .sft import run_sft

KNOWN = {"model_name_or_path", "stage", "dataset", "dataset_dir", "template", "finetuning_type", "cutoff_len"}


def run_exp(args: dict[str, Any] | None = None, callbacks: list[TrainerCallback] | None = None) -> None:
    found = read_args(args)
    assert isinstance(found, dict)
    training = {field.name for field in fields(Seq2SeqTrainingArguments)}
    unknown = found.keys() - training - KNOWN
    if unknown:
        raise ValueError(f"Some keys are not used by the HfArgumentParser: {sorted(unknown)}")
    training_args = Seq2SeqTrainingArguments(**{name: value for name, value in found.items() if name in training})
    rest = SimpleNamespace(**{name: value for name, value in found.items() if name not in training})
    rest.rows = json.loads((Path(rest.dataset_dir) / f"{rest.dataset}.json").read_text())
    run = {"pt": run_pt, "sft": run_sft, "dpo": run_dpo, "kto": run_kto}[rest.stage]
    more = (SimpleNamespace(),) if rest.stage == "sft" else ()  # generating_args
    run(rest, rest, training_args, rest, *more, callbacks or [])
