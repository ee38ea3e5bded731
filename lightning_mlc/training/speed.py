"""The speed of training, and what its time and memory are spent on."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.rows import TokenRows
from lightning_mlc.lightning_internals import ends_window
from lightning_mlc.models.flops import ModelFlops, Pass
from lightning_mlc.processes import DataParallel, mean_of_all
from lightning_mlc.training.module import AlignmentModule

ARITHMETIC = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
"""The dtype of matrix products, by the beginning of ``trainer.precision``."""
MISSING_PEAKS = {"NVIDIA H200": {torch.bfloat16: 989_400_000_000_000, torch.float16: 989_400_000_000_000}}
"""Operations per second of GPUs that Lightning 2.6 does not know. The H200 has the matrix units of the H100 (SXM)."""


@dataclass
class Work:
    """The work of one process."""

    tokens: float = 0.0
    """Tokens that the policy ran with gradients, without padding."""
    computed: float = 0.0
    """The same tokens with padding."""
    flops: float = 0.0
    """Floating-point operations of the policy and the reference."""
    translation_flops: float = 0.0
    """The part of ``flops`` for the translations."""


class Speed(Callback):
    """Logs tokens per second, padding, model FLOPs utilization, and the share of the translations.

    It counts the inputs of each call of the policy and the reference, so it counts the work that is really done. It
    waits for the device only when values are logged, every ``trainer.log_every_n_steps`` steps. The values cover all
    work since the last log, on all processes. The time includes waiting for batches, but no validation.

    Lightning's ``ThroughputMonitor`` waits for the device after every micro-batch, counts padding as tokens, and
    assumes the same number of operations for all batches. Only its table of the speeds of GPUs is used here.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        """The latest values that were logged, by name without ``speed/``."""
        self._handles: list[RemovableHandle] = []
        self._counts_flops = True
        """Whether the formula for operations holds for the models. If not, values that need it are left out."""
        self._peak: int | None = None
        """The most operations per second that the device can do, if known."""
        self._work = Work()
        self._seconds = 0.0
        self._running_since: float | None = None
        self._translations: tuple[TokenRows, ...] = ()
        """Rows of the current micro-batch that only the consistency terms need."""
        self._has_translations = False
        self._allocated = 0
        self._held = 0
        """Bytes that the translations of the current micro-batch hold for the backward pass."""
        self._most_held = 0
        """The most that a micro-batch's translations held since the last log."""

    # ---- counting work ------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        arithmetic = ARITHMETIC.get(str(trainer.precision).split("-")[0])
        if arithmetic is not None:
            self._peak = peak_flops(trainer.strategy.root_device, arithmetic)
        self._counts_flops = True
        for policy in pl_module.policies():
            flops = ModelFlops.of(policy.causal_lm)
            self._counts_flops &= flops is not None
            self._handles.append(policy.register_forward_pre_hook(partial(self._before_pass, trainer)))
            self._handles.append(policy.register_forward_hook(partial(self._after_pass, trainer, flops)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _before_pass(self, trainer: Trainer, _policy: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._weighs(trainer, arguments[0]):
            self._allocated = torch.cuda.memory_allocated()

    def _after_pass(
        self, trainer: Trainer, flops: ModelFlops | None, _policy: nn.Module, arguments: tuple[Any, ...], _output: Any
    ) -> None:
        if not trainer.training:
            return
        rows: TokenRows = arguments[0]
        layer: int | None = arguments[1] if len(arguments) > 1 else None
        positions: int = arguments[3] if len(arguments) > 3 else 0
        head_tokens = len(rows.response) + rows.num_first(positions)
        # A pass without logits ends at the layer whose hidden states are needed.
        size = Pass(rows.num_tokens, rows.num_tokens / len(rows), head_tokens, None if head_tokens else layer)
        operations = 0.0 if flops is None else flops.forward(size)
        if torch.is_grad_enabled():
            operations += 0.0 if flops is None else flops.backward(size)
            self._work.tokens += rows.num_tokens
            self._work.computed += rows.input_ids.numel()
        self._work.flops += operations
        if self._is_translation(rows):
            self._has_translations = True
            self._work.translation_flops += operations
        if self._weighs(trainer, rows):
            self._held += torch.cuda.memory_allocated() - self._allocated

    def _weighs(self, trainer: Trainer, rows: TokenRows) -> bool:
        """Whether to measure the memory of these rows, which takes a tenth of a millisecond."""
        return (
            rows.input_ids.is_cuda
            and torch.is_grad_enabled()
            and self._is_translation(rows)
            and trainer.training
            and self._is_logged(trainer, trainer.global_step + 1)
        )

    def _is_translation(self, rows: TokenRows) -> bool:
        return any(rows is translation for translation in self._translations)

    # ---- time, and logging --------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._translations = (*batch.translations, *batch.prompts)
        self._held = 0
        if self._running_since is None:
            self._running_since = self._now(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; the next micro-batch starts it again."""
        if self._running_since is not None:
            self._seconds += self._now(trainer) - self._running_since
            self._running_since = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._most_held = max(self._most_held, self._held)
        assert isinstance(pl_module, AlignmentModule)
        if not ends_window(trainer, batch_idx) or not self._is_logged(trainer, trainer.global_step):
            return
        assert self._running_since is not None
        now = self._now(trainer)
        seconds = self._seconds + now - self._running_since
        self.latest = self._figures(trainer, seconds)
        # As tensors on the host: Lightning would copy numbers to the device and back.
        found = {f"speed/{name}": torch.tensor(value, dtype=torch.float32) for name, value in self.latest.items()}
        pl_module.log_dict(found)
        self._work, self._seconds, self._running_since, self._most_held = Work(), 0.0, now, 0

    def tokens_per_second(self, trainer: Trainer) -> float:
        """The latest speed that was logged. Before the first log, the speed of this process times the number of shares.

        It does not wait for the device. 0 if nothing has been run yet.
        """
        if self.latest or self._running_since is None:
            return self.latest.get("tokens_per_second", 0.0)
        seconds = self._seconds + time.perf_counter() - self._running_since
        return DataParallel.of(trainer).size * self._work.tokens / seconds

    def _figures(self, trainer: Trainer, seconds: float) -> dict[str, float]:
        on_cuda = trainer.strategy.root_device.type == "cuda"
        memory = self._most_held / torch.cuda.max_memory_allocated() if on_cuda else 0.0
        means = torch.tensor([*astuple(self._work), memory])
        if trainer.world_size > 1:
            means = mean_of_all(means.to(trainer.strategy.root_device))
        *work, memory = means.tolist()
        # Each of the processes that split a pass counts the whole pass.
        tokens, computed, flops, translation_flops = (DataParallel.of(trainer).size * mean for mean in work)
        figures = {"tokens_per_second": tokens / seconds, "padding": 1 - tokens / computed}
        if self._peak is not None and self._counts_flops:
            figures["model_flops_utilization"] = flops / seconds / (self._peak * trainer.world_size)
        if self._has_translations and self._counts_flops:
            figures["consistency_flops"] = translation_flops / flops
        if self._has_translations and on_cuda:
            figures["consistency_memory"] = memory
        return figures

    def _is_logged(self, trainer: Trainer, step: int) -> bool:
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return every > 0 and (step % every == 0 or step == trainer.max_steps)

    def _now(self, trainer: Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_flops(device: torch.device, dtype: torch.dtype) -> int | None:
    """The most operations per second that ``device`` can do with matrices of ``dtype``. None if not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if dtype in MISSING_PEAKS.get(name, {}):
        return MISSING_PEAKS[name][dtype]
    return get_available_flops(device, dtype)
