"""How much memory this process holds, and how much it has held at most, in bytes.

On a GPU what PyTorch has given out there; else what is resident. ``getrusage`` is the second choice for the latter: on
Linux its maximum survives ``exec``, so that a small process started by a large one inherits the large one's.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def in_use(device: torch.device) -> int:
    """Bytes held now (at most so far, where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def forget_peak(device: torch.device) -> None:
    """What was held at most counts from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak of the resident set


def peak(device: torch.device) -> int:
    """Most bytes held since the process began, or since :func:`forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    if STATUS.exists():
        found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), flags=re.M)
        if found:
            return int(found[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
