"""Memory of this process, now and at its peak, in bytes.

On a GPU this is the memory that PyTorch has allocated there, elsewhere the resident memory. ``getrusage`` is only a
fallback: on Linux its maximum survives ``exec``, so a small process reports the peak of the large one that started it.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def in_use(device: torch.device) -> int:
    """Return the bytes in use now, or the peak so far where the system reports only that."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Let the peak begin at the memory in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak of the resident set


def peak(device: torch.device) -> int:
    """Return the peak since the process began, or since :func:`forget_peak`, in bytes."""
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
