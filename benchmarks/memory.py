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


def peak(device: torch.device) -> int:
    """Most bytes held since the process began."""
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
