"""Runs several command lines of ``lightning-mlc``, one after the other, as each of the processes of ``torchrun``.

A process costs ten seconds before it trains, so tests of several processes share them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_on_two(commands: list[list[str]], scratch: Path, timeout: int = 300) -> None:
    """Run ``commands`` on two CPU processes that ``torchrun`` starts, and raise if one fails."""
    listed = scratch / "commands.json"
    listed.write_text(json.dumps(commands))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", __file__, str(listed)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=scratch,
    )
    if done.returncode != 0:
        raise AssertionError(done.stdout[-1000:] + done.stderr[-4000:])


if __name__ == "__main__":
    from lightning_mlc.cli import main

    for command in json.loads(Path(sys.argv[1]).read_text()):
        if status := main(command):
            print("failed:", command, file=sys.stderr)
            sys.exit(status)
