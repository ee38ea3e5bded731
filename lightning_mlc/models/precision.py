"""``trainer.precision: auto``: bfloat16 where the device computes it faster, float32 elsewhere.

One function, :func:`decide`, answers for every command. A GPU is told by what it is. So is a CPU without units for
bfloat16: there the products are emulated, at a third to a twentieth of the speed of float32. Where a CPU says that
it has such units, :func:`try_both` confirms it, since some are slower than its float32 (``avx512_bf16`` on many).

Every process of a run must take the same precision, and it is chosen before the processes have met. So a run of
several processes has no trial, whose times differ from process to process: the units that a CPU has decide alone. That
is the same under ``torchrun``, SLURM and Lightning's own launcher. Nodes may still be unlike; once the processes have
met, :func:`~lightning_mlc.processes.require_same` refuses that.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn.functional import linear

OPTION = "trainer.precision"
AUTO = "auto"
HALF = "bf16-mixed"
FULL = "32-true"
AMX = "amx_bf16"
BFLOAT16_UNITS = {AMX: "AMX", "avx512_bf16": "AVX-512 bfloat16", "bf16": "Arm bfloat16"}
"""Flags of ``/proc/cpuinfo``, and what they are called."""
WITH_MATRIX_CORES = re.compile(r"gfx(908|90a|94\w|95\w|11\w\w|12\w\w)$")
"""AMD GPUs with matrix units for bfloat16: CDNA (MI100 and later), RDNA 3 and 4."""
LEAST_CAPABILITY = (8, 0)
"""NVIDIA GPUs have units for bfloat16 from Ampere on."""
TOKENS = 512
"""Rows of the trial's product at most: the tokens of a step."""
OPERATIONS = 1e9
"""Operations of one pass of the trial at most: 13 ms at 75 GFLOP/s. With fewer, conversions would take the time, and
AMX would look no faster than float32."""
EMULATED_OPERATIONS = 1.5e8
"""The same on a CPU without units for bfloat16: 2 ms, and 60 ms where it is emulated."""
REPEATS = 3
WORTHWHILE = 0.9
"""bfloat16 is taken where it needs less than this share of float32's time. It rounds more, so it must pay."""
USUAL_WIDTH = 1024
"""Width of the trial where there is no model of which to take it."""

_ALIASES = {"64": "64-true", "32": FULL, "16": "16-mixed", "bf16": HALF, "None": FULL}


@dataclass(frozen=True)
class Device:
    """What is known of the device that a model runs on."""

    kind: str
    """``cuda``, ``rocm``, ``mps``, ``cpu``, or another accelerator's name."""
    name: str = ""
    """Of a GPU, as its driver has it."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability."""
    architecture: str = ""
    """Of a ROCm GPU, such as ``gfx90a``."""
    features: frozenset[str] | None = frozenset()
    """Which of ``BFLOAT16_UNITS`` a CPU has; None if that cannot be found out."""

    @classmethod
    def of(cls, accelerator: str, devices: Any = "auto") -> Self:
        """The device that Lightning takes for ``accelerator`` and ``devices``; of several, the oldest."""
        if accelerator in (AUTO, "gpu"):
            other = "mps" if torch.backends.mps.is_available() else "cpu" if accelerator == AUTO else "cuda"
            accelerator = "cuda" if torch.cuda.is_available() else other
        if accelerator == "cpu":
            return cls("cpu", features=cpu_features())
        if accelerator != "cuda" or not torch.cuda.is_available():
            return cls(accelerator)
        found = [torch.cuda.get_device_properties(index) for index in _indexes(devices, torch.cuda.device_count())]
        oldest = min(found, key=lambda gpu: (gpu.major, gpu.minor))
        if torch.version.hip is None:
            return cls("cuda", oldest.name, (oldest.major, oldest.minor))
        return cls("rocm", oldest.name, architecture=str(oldest.gcnArchName).partition(":")[0])


def _indexes(devices: Any, count: int) -> list[int]:
    """Which of ``count`` GPUs Lightning takes for its option ``devices``; all, where it would refuse it."""
    text = str(devices).strip("[] ")
    if isinstance(devices, str | list) and ("," in text or isinstance(devices, list)):
        named = [int(part) for part in text.split(",") if part.strip().isdigit()]
    else:
        named = list(range(int(text))) if text.isdigit() else []
    return [index for index in named if index < count] or list(range(count))


@cache
def cpu_features() -> frozenset[str] | None:
    """Which of ``BFLOAT16_UNITS`` the CPU has, by the kernel; None where that is not Linux."""
    if platform.system() != "Linux":
        return None
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return features_in(text)


def features_in(cpuinfo: str) -> frozenset[str]:
    """Those of ``BFLOAT16_UNITS`` that ``cpuinfo``, the text of ``/proc/cpuinfo``, names for the first processor."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(flags[1].split() if flags else ()) & BFLOAT16_UNITS.keys()


@dataclass(frozen=True)
class Trial:
    """Seconds of a matrix product and its backward pass."""

    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        """How many times as long bfloat16 took as float32."""
        return self.bfloat16 / self.float32

    def __str__(self) -> str:
        times = f"{self.ratio:.2g} times "
        return f"bfloat16 took {'' if times == '1 times ' else times}as long as float32 in a trial"


def try_both(width: int, device: Device) -> Trial:
    """Time a linear layer of float32 weights on the CPU, plain and under autocast, as ``bf16-mixed`` runs it.

    Best of ``REPEATS`` interleaved passes after one that does not count; some 0.1 s of one core in all, 0.3 s where
    bfloat16 is emulated. Draws no random numbers.

    Args:
        width: Width of the model's hidden states, and so the layer's inputs. It has as many tokens and outputs, in
            equal numbers, as keep a pass within ``OPERATIONS``.
        device: The CPU. One without units gets a smaller trial, because it takes many times as long.
    """
    operations = EMULATED_OPERATIONS if device.features == frozenset() else OPERATIONS
    side = max(16, int((operations / (6 * width)) ** 0.5))
    tokens, outputs = min(side, TOKENS), min(side, width)
    with torch.enable_grad():
        states = torch.linspace(-1, 1, tokens * width).view(tokens, width).requires_grad_()
        weight = torch.linspace(-1, 1, outputs * width).view(outputs, width).requires_grad_()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(REPEATS + 1):
            for half, taken in seconds.items():
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    result = linear(states, weight)
                torch.autograd.grad(result, (states, weight), torch.ones_like(result))
                taken.append(time.perf_counter() - start)
    return Trial(float32=min(seconds[False][1:]), bfloat16=min(seconds[True][1:]))


@dataclass(frozen=True)
class Choice:
    """A precision and why it was taken."""

    precision: str
    reason: str

    @property
    def dtype(self) -> str:
        """What a model that is not trained runs in: the dtype of the products."""
        return "bfloat16" if self.precision == HALF else "float32"


def decide(device: Device, trial: Callable[[], Trial] | None = None) -> Choice:
    """The precision to take on ``device``.

    Args:
        device: Where the model runs.
        trial: Makes the trial, where one is needed; None if there must be none, because the answer has to be the same
            in several processes or in another run.
    """
    if device.kind == "cuda" and device.capability is None:
        return Choice(FULL, "no GPU was found")
    if device.kind in ("cuda", "rocm"):
        return _decide_gpu(device)
    if device.kind == "mps":
        return Choice(FULL, "bfloat16 has not been measured on Apple GPUs")
    if device.kind != "cpu":
        return Choice(FULL, f"nothing is known of bfloat16 on {device.kind}")
    return _decide_cpu(device.features, trial)


def _decide_gpu(device: Device) -> Choice:
    if device.kind == "rocm":
        told = f"{device.name} ({device.architecture})"
        has_units = WITH_MATRIX_CORES.match(device.architecture) is not None
    else:
        assert device.capability is not None
        told = f"{device.name} (compute capability {'.'.join(map(str, device.capability))})"
        has_units = device.capability >= LEAST_CAPABILITY
    return Choice(HALF if has_units else FULL, f"{told} has {'' if has_units else 'no '}bfloat16 units")


def _decide_cpu(features: frozenset[str] | None, trial: Callable[[], Trial] | None) -> Choice:
    if features is not None and not features:
        return Choice(FULL, "this CPU has no bfloat16 units")
    known = "it is not known whether this CPU has bfloat16 units"
    if features is not None:
        known = f"this CPU has {' and '.join(BFLOAT16_UNITS[name] for name in sorted(features))}"
    if trial is not None:
        tried = trial()
        return Choice(HALF if tried.ratio < WORTHWHILE else FULL, f"{known}, and {tried}")
    if features is not None and AMX in features:
        return Choice(HALF, known)
    return Choice(FULL, f"{known}, and without a trial only AMX is known to be faster than float32")


def slow_bfloat16(precision: Any, device: Device, trial: Callable[[], Trial]) -> str | None:
    """A warning, if ``precision``, which the user gave, is bfloat16 and ``device`` is a CPU that is slow at it."""
    if device.kind != "cpu" or not unified(precision).startswith(("bf16", "bfloat16")):
        return None
    if device.features is not None and AMX in device.features:
        return None
    tried = trial()
    if tried.ratio <= 1:
        return None
    why = "" if device.features or device.features is None else ": it has no bfloat16 units"
    faster = FULL if unified(precision) != "bfloat16" else "float32"
    return f"{precision} is slow on this CPU{why} ({tried}); {faster} or auto is faster"


def unified(precision: Any) -> str:
    """``precision`` as a Trainer calls it: ``bf16`` and ``32`` are other words for ``bf16-mixed`` and ``32-true``."""
    return _ALIASES.get(str(precision), str(precision))


def has_several_processes(devices: Any, num_nodes: Any) -> bool:
    """Whether a run on CPUs has more than one process, by its options and by what launchers tell a process."""
    launched = any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    single: Sequence[Any] = (AUTO, None, 1, "1")
    return launched or str(num_nodes) != "1" or devices not in single
