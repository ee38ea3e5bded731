"""The variants of a training step, each in a process of its own that takes one step whenever it is asked to.

Processes, so that the peak of memory is each one's own; one step at a time, so that the variants take turns and a
machine that slows down slows all of them. Ours are the command ``lightning-mlc fit`` itself, held up between its steps
by a callback: what is timed is what a user runs, loading and collating of the batch and logging included.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import memory
from benchmarks.published import Pair, PublishedStep
from benchmarks.timing import synchronize
from lightning_mlc.commands.training import run
from lightning_mlc.data import MultilingualData
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import dtype_of, load_causal_lm
from lightning_mlc.sources import ModelSource, load_tokenizer

BETA, WEIGHT, TEMPERATURE, EXTRACTOR_DIM, CLIP = 0.1, 0.8, 0.2, 512, 1.0
"""The published settings, and the usual limit of the gradient's norm."""


@dataclass(frozen=True)
class Settings:
    """What all variants have in common."""

    model: ModelSource
    data: str
    languages: tuple[str, ...]
    """The language of the responses first."""
    batch_size: int
    warm_up: int
    """First steps, in which what is lazy happens and memory grows."""
    steps: int
    """Steps after these, which are measured."""
    counted_steps: int
    """How many of them, from the first on, are taken once more with their arithmetic counted."""
    precision: str
    device: str
    gradient_checkpointing: bool
    learning_rate: float
    max_prompt_length: int
    max_response_length: int
    seed: int
    overrides: tuple[str, ...] = ()
    """``KEY=VALUE`` options of ``lightning-mlc fit``, for ours."""
    extractor: str | None = None
    """A file that ``dpo_mlc`` leaves the extractor it begins with in, and from which ``published`` takes its own."""


# ---- what is trained on --------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[list[Pair]]:
    """The pairs of each step, in the order in which training will see them.

    Raises:
        UserError: A row lacks a language or a rejected response; there are too few rows.
    """
    examples = list(parse_rows(read_rows(settings.data, "--data"), settings.languages[0], settings.data))
    for example in examples:
        missing = [language for language in settings.languages if language not in example.prompts]
        if missing:
            raise UserError(
                example.where,
                f"has no prompt in '{missing[0]}', which the published recipe needs; "
                "give --languages that every row has",
            )
        if example.rejected is None:
            raise UserError(example.where, "has no rejected response; give preference pairs")
    steps = settings.warm_up + settings.steps
    if steps * settings.batch_size > len(examples):
        raise UserError(
            "--data",
            f"{settings.data} has {len(examples)} rows, too few for {steps} steps of {settings.batch_size}; "
            "give more data or fewer --steps",
        )
    chat = ChatTokenizer(
        load_tokenizer(settings.model), settings.max_prompt_length, settings.max_response_length, "cut"
    )
    by_id = {example.id: example for example in examples}
    planned = []
    for ids in _order(settings, steps):
        rows = [chat.encode(by_id[id], settings.languages) for id in ids]
        planned.append([Pair(row["id"], tuple(row["prompts"]), row["chosen"], row["rejected"]) for row in rows])
    return planned


def _order(settings: Settings, steps: int) -> list[tuple[str, ...]]:
    """The ids in the batches that training will draw."""
    data = MultilingualData(
        settings.data,
        languages=list(settings.languages),
        source_language=settings.languages[0],
        val_share=0.0,
        batch_size=settings.batch_size,
        max_prompt_length=settings.max_prompt_length,
        max_response_length=settings.max_response_length,
        seed=settings.seed,
        name_or_path=settings.model.name_or_path,
        gguf_file=settings.model.gguf_file,
    )
    data.prepare_data()
    data.setup("fit")
    return [batch.ids for batch in islice(data.train_dataloader(), steps)]


# ---- taking turns --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """An optimizer step."""

    seconds: float
    """From the request to the end of all that was asked of the device."""
    ids: tuple[str, ...]
    loss: float


class Counts(NamedTuple):
    """Arithmetic of an optimizer step."""

    flops: int
    """Floating-point operations of matrix products and attention, forward and backward."""
    trained: int
    """Positions, padding included, that went through the decoder with a gradient."""
    frozen: int
    """And without one: through the reference."""


class Memory(NamedTuple):
    """Bytes."""

    before: int
    """Held before the first step: libraries and models."""
    peak: int


class Failure(NamedTuple):
    """Why a worker stopped."""

    reason: str


class Turns:
    """The worker's end of the pipe. In this order: `ready`, (`begin`, `end`) for every step, `rest`, `count`."""

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self._pipe = pipe
        self._device = device
        self._before = 0
        self._start = 0.0
        self._counts: list[Counts] = []

    def ready(self) -> None:
        """All is loaded."""
        gc.collect()
        self._before = memory.in_use(self._device)
        self._pipe.send("ready")

    def begin(self) -> None:
        """Wait until a step is asked for."""
        self._pipe.recv()
        self._start = time.perf_counter()

    def end(self, ids: tuple[str, ...], loss: torch.Tensor) -> None:
        """The step is taken."""
        synchronize(self._device)
        seconds = time.perf_counter() - self._start
        self._pipe.send(Step(seconds, ids, float(loss)))

    def rest(self) -> None:
        """All timed steps are taken: wait until the counting is asked for."""
        self._pipe.send(Memory(self._before, memory.peak(self._device)))
        self._pipe.recv()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what one step does."""
        positions: Counter[tuple[int, bool]] = Counter()

        def count(module: nn.Module, inputs: Any) -> None:
            if isinstance(module, nn.Embedding):
                positions[module.num_embeddings, torch.is_grad_enabled()] += inputs[0].numel()

        handle = register_module_forward_pre_hook(count)
        try:
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
                yield
        finally:
            handle.remove()
        # The largest table is that of the tokens; some models have another one, of positions.
        table = max((size for size, _ in positions), default=0)
        self._counts.append(Counts(flops.get_total_flops(), positions[table, True], positions[table, False]))

    def count(self) -> None:
        """All counted steps are taken."""
        self._pipe.send(self._counts)


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _sdpa_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}
"""What PyTorch's counter does not know. As for the others, the causal half is counted too."""


# ---- the variants --------------------------------------------------------------------------------------------------


def published(settings: Settings, planned: list[list[Pair]], turns: Turns) -> None:
    """The authors' recipe."""
    torch.manual_seed(settings.seed)
    device, dtype = torch.device(settings.device), dtype_of(settings.precision)
    model = load_causal_lm(settings.model, dtype).train().to(device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
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


def dpo(settings: Settings, planned: list[list[Pair]], turns: Turns) -> None:
    """DPO of this project, without the consistency term."""
    _ours(settings, weight=0.0, turns=turns)


def dpo_mlc(settings: Settings, planned: list[list[Pair]], turns: Turns) -> None:
    """DPO + MLC of this project."""
    _ours(settings, weight=WEIGHT, turns=turns)


def trl(settings: Settings, planned: list[list[Pair]], turns: Turns) -> None:
    """DPO of TRL: its trainer, collator and loss, with its defaults but for what the variants have in common."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[torch.Tensor] = []

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # which would be tokenised

        def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().compute_loss(*arguments, **keywords)
            losses.append(loss.detach())
            return loss

    class OnRequest(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.ready()
            turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.end(tuple(pair.id for pair in planned[state.global_step - 1]), losses[-1])
            if state.global_step < len(planned):
                turns.begin()

    class Counted(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stack = ExitStack()
            if state.global_step >= settings.warm_up:
                self.stack.enter_context(turns.counting())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.stack.close()

    dtype = dtype_of(settings.precision)
    pairs = [pair for step in planned for pair in step]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": settings.batch_size,
            "train_sampling_strategy": "sequential",
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": CLIP,
            "weight_decay": 0.0,
            "beta": BETA,
            "bf16": settings.precision == "bf16-mixed",
            "gradient_checkpointing": settings.gradient_checkpointing,
            "max_length": None,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": settings.seed,
            "use_cpu": settings.device == "cpu",
        }
        model: Any = load_causal_lm(settings.model, dtype)
        model.is_quantized = False  # the weights of a GGUF file are dequantised on loading, and the Trainer asks
        trainer = Tokenised(
            model,
            ref_model=load_causal_lm(settings.model, dtype),
            args=DPOConfig(**options, max_steps=len(planned)),
            train_dataset=Dataset.from_dict(
                {
                    "prompt_ids": [pair.prompts[0] for pair in pairs],
                    "chosen_ids": [pair.chosen for pair in pairs],
                    "rejected_ids": [pair.rejected for pair in pairs],
                }
            ),
            processing_class=load_tokenizer(settings.model),
            callbacks=[OnRequest()],
        )
        trainer.train()
        turns.rest()
        trainer.pop_callback(OnRequest)
        trainer.add_callback(Counted())
        trainer.args.max_steps = settings.warm_up + settings.counted_steps
        if settings.counted_steps:
            trainer.train()


VARIANTS: dict[str, Callable[[Settings, list[list[Pair]], Turns], None]] = {
    "published": published,
    "dpo": dpo,
    "dpo_mlc": dpo_mlc,
    "trl": trl,
}


# ---- ours: the command, and callbacks that it is given by name -----------------------------------------------------

_here: tuple[Turns, Settings] | None = None
"""Whose turns the callbacks of this process mean: the command makes callbacks itself, from their names."""


class OnRequest(Callback):
    """Holds training up until the next step is asked for."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert _here is not None
        turns, settings = _here
        if settings.extractor is not None:
            own: dict[str, torch.Tensor] = {}
            for name, parameter in pl_module.named_parameters():
                if "extractor." in name:
                    own[name.rpartition(".")[2]] = parameter.detach()
            save_file(own, settings.extractor)
        turns.ready()
        turns.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert _here is not None
        turns, _ = _here
        turns.end(batch.ids, outputs["loss"])
        if trainer.global_step < trainer.max_steps:
            turns.begin()


class Counted(Callback):
    """Counts what the steps do."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert _here is not None
        turns, settings = _here
        self._stack = ExitStack()
        if batch_idx >= settings.warm_up:
            self._stack.enter_context(turns.counting())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stack.close()


def _ours(settings: Settings, weight: float, turns: Turns) -> None:
    global _here
    _here = turns, settings if weight > 0 else replace(settings, extractor=None)
    with tempfile.TemporaryDirectory() as folder:
        run(_arguments(settings, weight, Path(folder) / "timed", settings.warm_up + settings.steps, OnRequest))
        turns.rest()
        if settings.counted_steps:
            steps = settings.warm_up + settings.counted_steps
            run(_arguments(settings, weight, Path(folder) / "counted", steps, Counted))


def _arguments(settings: Settings, weight: float, out: Path, steps: int, callback: type[Callback]) -> list[str]:
    """``lightning-mlc fit`` with the published settings."""
    options = {
        "out": out,
        "seed_everything": settings.seed,
        "trainer.accelerator": "gpu" if settings.device == "cuda" else settings.device,
        "trainer.devices": 1,
        "trainer.precision": settings.precision,
        "trainer.max_steps": steps,
        "trainer.gradient_clip_val": CLIP,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks+": f"{__name__}.{callback.__name__}",
        "checkpoint.save_top_k": 0,
        "checkpoint.save_last": "false",
        "model.name_or_path": settings.model.name_or_path,
        "model.gguf_file": settings.model.gguf_file or "null",
        "model.objective": "DPO",
        "model.objective.beta": BETA,
        "model.consistency.mlc.weight": weight,
        "model.consistency.mlc.temperature": TEMPERATURE,
        "model.consistency.layer": -1,
        "model.consistency.extractor": "linear",
        "model.consistency.extractor_dim": EXTRACTOR_DIM,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": settings.learning_rate,
        "model.optimizer.weight_decay": 0.0,
        "model.gradient_checkpointing": str(settings.gradient_checkpointing).lower(),
        "data.train_path": settings.data,
        "data.languages": f"[{','.join(settings.languages)}]",
        "data.source_language": settings.languages[0],
        "data.val_share": 0.0,
        "data.batch_size": settings.batch_size,
        "data.max_prompt_length": settings.max_prompt_length,
        "data.max_response_length": settings.max_response_length,
    }
    return ["fit", *(f"--{key}={value}" for key, value in options.items()), *(f"--{o}" for o in settings.overrides)]


# ---- the process ---------------------------------------------------------------------------------------------------


def work(variant: str, settings: Settings, planned: list[list[Pair]], pipe: Connection, log: Path) -> None:
    """Run ``variant``, with all that it prints in the file ``log``. The target of a process."""
    with log.open("w") as file:
        for stream in (1, 2):  # the descriptors: loggers keep the streams that they first saw
            os.dup2(file.fileno(), stream)
        try:
            turns = Turns(pipe, torch.device(settings.device))
            VARIANTS[variant](settings, planned, turns)
            turns.count()
        except EOFError:
            pass  # whoever asked for steps is gone
        except torch.OutOfMemoryError:
            pipe.send(Failure("out of memory"))
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().splitlines() or [""]
            pipe.send(Failure(f"{type(error).__name__}: {first[0]}"))
