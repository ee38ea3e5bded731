"""The variants of a training step. Each runs in its own process, which takes one step for each request.

With its own process, a variant's peak of memory does not include another variant's. The variants take one step each in
turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.published import Pair, PublishedStep
from benchmarks.steps.ours import dpo, dpo_mlc
from benchmarks.steps.settings import BETA, CLIP, EXTRACTOR_DIM, TEMPERATURE, WEIGHT, StepSettings
from benchmarks.steps.trl_step import trl, trl_mlc, trl_mlc_sum
from benchmarks.steps.turns import Failure, Turns
from lightning_mlc.models.loading import dtype_of, enable_checkpointing, load_causal_lm
from lightning_mlc.sources import load_tokenizer


def published(settings: StepSettings, planned: list[list[Pair]], turns: Turns) -> None:
    """Take the steps of the authors' recipe: first the timed ones, then the counted ones."""
    torch.manual_seed(settings.seed)
    device, dtype = torch.device(settings.device), dtype_of(settings.precision)
    model = load_causal_lm(settings.model, dtype).train().to(device)
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    extractor = nn.Linear(model.config.get_text_config().hidden_size, EXTRACTOR_DIM)
    if settings.extractor is not None:
        extractor.load_state_dict(load_file(settings.extractor))
    step = PublishedStep(
        model,
        extractor.to(device, dtype),
        pad_id=int(load_tokenizer(settings.model).pad_token_id or 0),
        learning_rate=settings.learning_rate,
        mixed=settings.precision.endswith("-mixed"),
        beta=BETA,
        weight=WEIGHT,
        temperature=TEMPERATURE,
        clip=CLIP,
    )
    turns.ready()
    for pairs in planned:
        turns.begin()
        loss = step(pairs)
        turns.end(tuple(pair.id for pair in pairs), loss)
    turns.rest()
    for pairs in planned[settings.warm_up :][: settings.counted_steps]:
        with turns.counting():
            step(pairs)


VARIANTS: dict[str, Callable[[StepSettings, list[list[Pair]], Turns], None]] = {
    "published": published,
    "dpo": dpo,
    "dpo_mlc": dpo_mlc,
    "trl": trl,
    "trl_mlc": trl_mlc,
    "trl_mlc_sum": trl_mlc_sum,
}


def work(variant: str, settings: StepSettings, planned: list[list[Pair]], pipe: Connection, log: Path) -> None:
    """Run ``variant`` and redirect its output to the file ``log``. This is the target of a process."""
    with log.open("w") as file:
        for stream in (1, 2):  # the descriptors, because loggers keep the streams that they first saw
            os.dup2(file.fileno(), stream)
        try:
            turns = Turns(pipe, torch.device(settings.device))
            VARIANTS[variant](settings, planned, turns)
            turns.count()
        except EOFError:
            pass  # the process that requests steps has ended
        except torch.OutOfMemoryError:
            pipe.send(Failure("out of memory"))
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().splitlines() or [""]
            pipe.send(Failure(f"{type(error).__name__}: {first[0]}"))
