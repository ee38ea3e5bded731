"""``lightning-mlc`` on one process or two, and what can be seen of them from outside.

On the CPU, one thread each. Where there are GPUs, each process has one; a single GPU runs the strategies with one
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

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
DDP = ("--trainer.strategy=ddp",)
FSDP2 = ("--config=strategy/fsdp2",)
SEVERAL = min(2, torch.cuda.device_count()) if ON_GPU else 2
"""Processes of a strategy for several."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    f"DDP x {SEVERAL}": (SEVERAL, DDP),
    f"FSDP2 x {SEVERAL}": (SEVERAL, FSDP2),
}
"""Processes, and options of ``fit``."""


def launched(words: Sequence[str], processes: int) -> list[str]:
    """The command line ``words`` of ``lightning-mlc`` on so many processes: several are started by ``torchrun``."""
    launcher = [] if processes == 1 else ["torch.distributed.run", f"--nproc_per_node={processes}", "-m"]
    return [sys.executable, "-m", *launcher, "lightning_mlc", *words]


def command(words: list[str], layout: str) -> list[str]:
    """The command line ``words`` of ``lightning-mlc`` in a layout."""
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
    """Ids of the processes that train, in their order; those that are there."""
    if LAYOUTS[layout][0] == 1:
        return [started.pid]
    tasks = Path(f"/proc/{started.pid}/task").glob("*/children")
    found = []
    for task in tasks:
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:  # it has just ended
            continue
    return sorted(found)


def kill(processes: list[int]) -> None:
    """SIGKILL, to those that are there."""
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def tail(log: Path, lines: int = 15) -> str:
    """The end of what was written."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
