"""Runs trainers with ``add_mlc`` in this process, or in two that ``torchrun`` starts.

Two processes take twenty seconds before they train, so many runs share them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from conftest import SGD_ARGUMENTS, example_rows, write_jsonl
from processes import _python
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lightning_mlc.plugins import add_mlc, mlc_dataset


@dataclass(frozen=True)
class Run:
    """One run of a trainer."""

    name: str
    trainer: str = "DPO"
    """``DPO`` or ``Reward`` of TRL, or ``plain``: the Trainer of transformers."""
    batch: int = 4
    """Number of rows of a micro-batch, of all processes together."""
    rows: int = 12
    """Number of rows to train on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the trainer's arguments."""
    mlc: dict[str, Any] = field(default_factory=dict)
    """Of ``add_mlc``."""
    sharded: bool = False
    """Whether the model is sharded by FSDP2."""
    uneven: bool = False
    """Whether every second prompt has languages of very different lengths."""
    killed_after: int | None = None
    """Number of steps after which SIGKILL ends the first process."""
    resumed_from: str | None = None
    """A checkpoint."""


@dataclass(frozen=True)
class Trained:
    """What a run leaves."""

    weights: torch.Tensor
    """All weights of the model."""
    mlc: dict[str, torch.Tensor]
    """The extractor and the running mean."""
    logs: list[dict[str, float]]
    """Of each step."""
    sharded: bool
    """Whether each process had a part of each weight."""


def run(case: Run, model: Path, scratch: Path) -> Trained:
    """Run ``case`` in this process, which is alone or one of several."""
    own = scratch / case.name
    own.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(case, model, own)
    if case.sharded:
        _shard(trainer)
    options = {"weight": 10.0, "extractor_dim": 16, "prompts_per_step": 4, **case.mlc}
    add_mlc(trainer, _prompts(case), **options)
    if case.killed_after is not None:
        trainer.add_callback(_Kill(case.killed_after))
    trainer.train(resume_from_checkpoint=case.resumed_from)
    parameters = [_whole(parameter) for parameter in trainer.model.parameters()]
    logs = [logged for logged in trainer.state.log_history if "loss" in logged]
    mlc = {name: tensor.clone() for name, tensor in trainer.mlc.state_dict().items()}
    sharded = all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return Trained(torch.cat([parameter.flatten() for parameter in parameters]), mlc, logs, sharded)


def run_on_two(cases: list[Run], model: Path, scratch: Path, timeout: int = 900) -> dict[str, Trained]:
    """Run ``cases`` one after the other on the same two processes, and raise if one fails.

    Args:
        cases: The runs.
        model: Folder of the model.
        scratch: Folder for files of the runs.
        timeout: Seconds. Processes that wait for each other wait longer.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    listed = scratch / "runs.json"
    listed.write_text(json.dumps([asdict(case) for case in cases]))
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", __file__, str(listed), str(model), str(scratch)]
    _python(words, scratch, timeout)
    return {case.name: Trained(**torch.load(scratch / f"{case.name}.pt")) for case in cases}


def _shard(trainer: Trainer) -> None:
    """Turn FSDP2 on, as the trainer's option ``fsdp`` does on GPUs. On CPUs, accelerate passes over the option."""
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    trainer.is_fsdp_enabled = True


class _Kill(TrainerCallback):
    def __init__(self, after: int) -> None:
        self._after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._after and distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _trainer(case: Run, folder: Path, own: Path) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options: dict[str, Any] = {
        "output_dir": str(own / "out"),
        **SGD_ARGUMENTS,
        "per_device_train_batch_size": case.batch // processes,
        "max_steps": 3,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
        **case.options,
    }
    if case.trainer == "plain":
        return Trainer(
            AutoModelForCausalLM.from_pretrained(folder),
            TrainingArguments(**options),
            train_dataset=_texts(tokenizer, case.rows),
            processing_class=tokenizer,
        )
    import trl

    kind: Any = AutoModelForSequenceClassification if case.trainer == "Reward" else AutoModelForCausalLM
    torch.manual_seed(0)  # the head of a reward model is new
    model = kind.from_pretrained(folder, **({"num_labels": 1} if case.trainer == "Reward" else {}))
    # Each process its own file, because one may read while the other writes.
    data = write_jsonl(own / f"rows-{os.environ.get('RANK', 0)}.jsonl", example_rows(case.rows))
    made: Trainer = getattr(trl, f"{case.trainer}Trainer")(
        model=model,
        args=getattr(trl, f"{case.trainer}Config")(**options),
        train_dataset=mlc_dataset(data),
        processing_class=tokenizer,
    )
    return made


def _texts(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, because the mean over tokens of all processes is not that of their means."""
    texts = [row["chosen"] * (1 + number % 3) for number, row in enumerate(example_rows(count))]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    padding = [longest - len(row) for row in ids]
    pad = tokenizer.pad_token_id
    return [
        {
            "input_ids": row + [pad] * more,
            "labels": row + [-100] * more,
            "attention_mask": [1] * len(row) + [0] * more,
        }
        for row, more in zip(ids, padding, strict=True)
    ]


def _prompts(case: Run) -> list[dict[str, str]]:
    prompts: list[dict[str, str]] = [row["prompt"] for row in example_rows(10)]
    if case.uneven:
        for number, prompt in enumerate(prompts):
            prompt |= {"en": f"Bag {number}?", "sw": f"Gunia {number}?", "zh": f"包 {number}?"}
            if number % 2:
                prompt["sw"] *= 6
                prompt["zh"] *= 20
    return prompts


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.clone()


def _run_all(listed: Path, model: Path, scratch: Path) -> None:
    environment = dict(os.environ)
    for options in json.loads(listed.read_text()):
        case = Run(**options)
        try:
            trained = run(case, model, scratch)
        except BaseException:
            print(f"failed: {case.name}", file=sys.stderr)
            raise
        if int(os.environ["RANK"]) == 0:
            torch.save(vars(trained), scratch / f"{case.name}.pt")
        for name in os.environ.keys() - environment.keys():  # TrainingArguments tells accelerate of FSDP this way
            del os.environ[name]
        os.environ.update(environment)
    distributed.destroy_process_group()


if __name__ == "__main__":
    _run_all(*map(Path, sys.argv[1:]))
