"""Start ``lightning-mlc`` on one or more processes, and find, stop and read the log of these processes.

On a CPU each process has one thread. On GPUs each process has one GPU; on a single GPU every strategy runs with one
process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.environment import ROOT

ON_GPU = torch.cuda.is_available()
DDP = ("--trainer.strategy=ddp",)
FSDP2 = ("--config=strategy/fsdp2",)
SEVERAL = min(2, torch.cuda.device_count()) if ON_GPU else 2
"""Number of processes of a strategy for several processes."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    f"DDP x {SEVERAL}": (SEVERAL, DDP),
    f"FSDP2 x {SEVERAL}": (SEVERAL, FSDP2),
}
"""By layout: the number of processes, and options of ``fit``."""


def launched(words: Sequence[str], processes: int) -> list[str]:
    """Return the command that runs ``lightning-mlc`` with ``words``; ``torchrun`` starts more than one process."""
    launcher = [] if processes == 1 else ["torch.distributed.run", f"--nproc_per_node={processes}", "-m"]
    return [sys.executable, "-m", *launcher, "lightning_mlc", *words]


def command(words: list[str], layout: str) -> list[str]:
    """Return the command that runs ``lightning-mlc`` with ``words`` in ``layout``."""
    processes, options = LAYOUTS[layout]
    common = [f"--trainer.accelerator={'gpu' if ON_GPU else 'cpu'}", f"--trainer.devices={processes}"]
    return launched([words[0], *options, *common, *words[1:]], processes)


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command that writes to ``log``."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment)


def workers(started: subprocess.Popen[bytes], layout: str) -> list[int]:
    """Return the ids of the training processes that are running, in ascending order."""
    if LAYOUTS[layout][0] == 1:
        return [started.pid]
    tasks = Path(f"/proc/{started.pid}/task").glob("*/children")
    found = []
    for task in tasks:
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:  # the process has just ended
            continue
    return sorted(found)


def kill(processes: list[int]) -> None:
    """Send SIGKILL to those of ``processes`` that are running."""
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of ``log``."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
