"""``trainer.precision: auto``: bfloat16 where the device computes it faster, float32 elsewhere.

Every command uses the same function, :func:`decide`. The type of a GPU decides. A CPU without units for bfloat16 takes
float32, because there products in bfloat16 are emulated, at a third to a twentieth of the speed of float32. On a CPU
with such units, :func:`try_both` measures both, because some units are slower than float32 (``avx512_bf16`` on many).

All processes of a run must choose the same precision, and they choose before they can communicate. Measured times
differ between processes, so a run of several processes measures nothing, and the units of the CPU decide. This holds
under ``torchrun``, SLURM and Lightning's own launcher. If nodes are unlike, their choices may still differ;
:func:`~lightning_mlc.processes.require_same` then stops the run as soon as the processes can communicate.
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
"""Flags of ``/proc/cpuinfo``, and the names of these units."""
WITH_MATRIX_CORES = re.compile(r"gfx(908|90a|94\w|95\w|11\w\w|12\w\w)$")
"""AMD GPUs with matrix units for bfloat16: CDNA (MI100 and later), RDNA 3 and 4."""
LEAST_CAPABILITY = (8, 0)
"""NVIDIA GPUs from this compute capability on (Ampere) have units for bfloat16."""
TOKENS = 512
"""Largest number of rows in the trial: about the tokens of a step."""
OPERATIONS = 1e9
"""Largest number of operations of one pass of the trial: 13 ms at 75 GFLOP/s. In a smaller trial conversions would take
most of the time, and AMX would seem no faster than float32."""
EMULATED_OPERATIONS = 1.5e8
"""The same for a CPU without units for bfloat16: 2 ms in float32, 60 ms in emulated bfloat16."""
REPEATS = 3
"""Number of passes of the trial that count."""
WORTHWHILE = 0.9
"""bfloat16 is chosen if it takes less than this share of float32's time. It rounds more, so a small gain is not
enough."""
USUAL_WIDTH = 1024
"""Width of the trial if no model is known."""

_ALIASES = {"64": "64-true", "32": FULL, "16": "16-mixed", "bf16": HALF, "None": FULL}


@dataclass(frozen=True)
class Device:
    """A description of the device that a model runs on."""

    kind: str
    """``cuda``, ``rocm``, ``mps``, ``cpu``, or the name of another accelerator."""
    name: str = ""
    """Name of a GPU, from its driver."""
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA GPU."""
    architecture: str = ""
    """Architecture of a ROCm GPU, such as ``gfx90a``."""
    features: frozenset[str] | None = frozenset()
    """Those of ``BFLOAT16_UNITS`` that a CPU has. None: unknown."""

    @classmethod
    def of(cls, accelerator: str, devices: Any = "auto") -> Self:
        """Describe the device that Lightning would use. Of several GPUs, the oldest one.

        Args:
            accelerator: Lightning's option ``accelerator``.
            devices: Lightning's option ``devices``.
        """
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
    """Indices of the GPUs, of ``count``, that Lightning uses for its option ``devices``. If it is invalid: all."""
    text = str(devices).strip("[] ")
    if isinstance(devices, str | list) and ("," in text or isinstance(devices, list)):
        named = [int(part) for part in text.split(",") if part.strip().isdigit()]
    else:
        named = list(range(int(text))) if text.isdigit() else []
    return [index for index in named if index < count] or list(range(count))


@cache
def cpu_features() -> frozenset[str] | None:
    """Ask Linux which of ``BFLOAT16_UNITS`` the CPU has. None: unknown, for example on another system."""
    if platform.system() != "Linux":
        return None
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return features_in(text)


def features_in(cpuinfo: str) -> frozenset[str]:
    """Find those of ``BFLOAT16_UNITS`` that the first processor has.

    Args:
        cpuinfo: The text of ``/proc/cpuinfo``.
    """
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(flags[1].split() if flags else ()) & BFLOAT16_UNITS.keys()


@dataclass(frozen=True)
class Trial:
    """Times of a matrix product with its backward pass."""

    float32: float
    """Seconds in float32."""
    bfloat16: float
    """Seconds in bfloat16."""

    @property
    def ratio(self) -> float:
        """The time of bfloat16 divided by the time of float32."""
        return self.bfloat16 / self.float32

    def __str__(self) -> str:
        times = f"{self.ratio:.2g} times "
        return f"bfloat16 took {'' if times == '1 times ' else times}as long as float32 in a trial"


def try_both(width: int, device: Device) -> Trial:
    """Time a linear layer with float32 weights on the CPU, without and with the autocast of ``bf16-mixed``.

    Each time is the best of ``REPEATS`` interleaved passes after a first one that does not count. All of it takes about
    0.1 s of one core, or 0.3 s if bfloat16 is emulated. It draws no random numbers.

    Args:
        width: Width of the model's hidden states, and so of the layer's input. The numbers of tokens and outputs are
            chosen so that a pass has at most ``OPERATIONS`` operations.
        device: The CPU. A CPU without units for bfloat16 gets a smaller trial, because it is many times slower.
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
    """A precision, and why it was chosen."""

    precision: str
    """``bf16-mixed`` or ``32-true``."""
    reason: str
    """The reason, for a message."""

    @property
    def dtype(self) -> str:
        """Dtype of a model that is not trained: the dtype of the products."""
        return "bfloat16" if self.precision == HALF else "float32"


def decide(device: Device, trial: Callable[[], Trial] | None = None) -> Choice:
    """Choose the precision for a device.

    Args:
        device: The device that the model runs on.
        trial: Runs a trial. Called only if it is needed. None: no trial, because the choice must be the same in
            several processes or in another run.
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
    """Return a warning if the user has chosen bfloat16 for a CPU that is slow at it.

    Args:
        precision: The user's precision.
        device: The device that the model runs on.
        trial: Runs a trial. Called only if it is needed.
    """
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
    """Return the Trainer's main name of ``precision``: ``bf16`` means ``bf16-mixed``, and ``32`` means ``32-true``."""
    return _ALIASES.get(str(precision), str(precision))


def has_several_processes(devices: Any, num_nodes: Any) -> bool:
    """Whether a run on CPUs has several processes.

    Args:
        devices: Lightning's option ``devices``.
        num_nodes: Lightning's option ``num_nodes``. The variables that launchers set count too.
    """
    launched = any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    single: Sequence[Any] = (AUTO, None, 1, "1")
    return launched or str(num_nodes) != "1" or devices not in single
