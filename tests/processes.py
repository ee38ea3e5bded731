"""Run commands of ``lightning-mlc`` on two processes.

A process takes ten seconds to start, so tests of several processes share them. Either one command follows the other in
the same processes (:func:`run_on_two`), or, if processes must die, each command runs in forks of a process that has
imported everything (:func:`run_jobs`). The agent of ``torchrun`` starts and watches these forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_on_two(commands: list[list[str]], scratch: Path, timeout: int = 900) -> None:
    """Run ``commands`` on two CPU processes that ``torchrun`` starts, and raise if one fails."""
    listed = scratch / "commands.json"
    listed.write_text(json.dumps(commands))
    _python(["-m", "torch.distributed.run", "--nproc_per_node=2", __file__, str(listed)], scratch, timeout)


@dataclass(frozen=True)
class Job:
    """A command to start."""

    command: list[str]
    processes: int = 2
    """1, or 2: an agent of ``torchrun`` starts two processes."""
    slurm: bool = False
    """Whether the processes get the environment of ``srun`` instead."""


@dataclass(frozen=True)
class Ended:
    """The end of a job."""

    status: int
    """0, or the exit status of the first process that failed; -9 after SIGKILL."""
    signalled: int
    """The signal that the agent received and passed on, or 0."""
    left: int
    """Number of processes that still ran when the agent was done."""
    stderr: list[str]
    """Output of each process."""


def run_jobs(jobs: list[Job], scratch: Path, timeout: int = 900) -> list[Ended]:
    """Run ``jobs`` one after the other, each in new processes.

    A process that waits for a dead one waits for half an hour (a limit of gloo), and so exceeds ``timeout`` seconds.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    listed, ended = scratch / "jobs.json", scratch / "ended.json"
    listed.write_text(json.dumps([asdict(job) for job in jobs]))
    _python([__file__, str(listed), str(ended)], scratch, timeout)
    return [Ended(**found) for found in json.loads(ended.read_text())]


def run_in_forks(work: Callable[[], Any], folder: Path, count: int = 2) -> list[Any]:
    """Return the results of ``work``, as JSON, in ``count`` forks of this process that form a gloo group.

    ``work`` may only run forward passes: autograd's threads do not survive a fork.
    """
    forks = [get_context("fork").Process(target=_fork, args=(work, rank, count, folder)) for rank in range(count)]
    for fork in forks:
        fork.start()
    try:
        for fork in forks:
            fork.join(timeout=300)
        assert [fork.exitcode for fork in forks] == [0] * count
    finally:
        for fork in forks:
            fork.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _fork(work: Callable[[], Any], rank: int, count: int, folder: Path) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork either
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    (folder / f"{rank}.json").write_text(json.dumps(work()))
    distributed.destroy_process_group()


def _python(words: list[str], folder: Path, timeout: int) -> None:
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **threads},
        cwd=folder,
    )
    if done.returncode != 0:
        raise AssertionError(done.stdout[-1000:] + done.stderr[-4000:])


def _work(command: list[str]) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_mlc.cli import main

    # Restore the state of a new process: Lightning reads its rank when it is imported, and signals end the process.
    rank_zero_only.rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    try:
        status = main(command)
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        sys.exit(status)


def _run_job(job: Job, logs: Path) -> Ended:
    before = _children()
    alone = job.slurm or job.processes == 1
    status, signalled = (_run_without_agent if alone else _run_under_agent)(job, logs)
    written = [path.read_text() for path in sorted(logs.rglob("stderr.log"))]
    return Ended(status, signalled, len(_children() - before), written)


def _run_without_agent(job: Job, logs: Path) -> tuple[int, int]:
    processes = [
        get_context("fork").Process(target=_work_without_agent, args=(job, rank, logs)) for rank in range(job.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return next((process.exitcode for process in processes if process.exitcode), 0), 0


def _work_without_agent(job: Job, rank: int, logs: Path) -> None:
    if job.slurm:
        count = str(job.processes)
        os.environ |= {"SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": count, "SLURM_JOB_ID": str(os.getppid())}
        os.environ |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_JOB_NAME": "mlc"}
    own = logs / str(rank)
    own.mkdir(parents=True)
    for stream in (sys.stdout, sys.stderr):
        name = stream.name.strip("<>")
        os.dup2(os.open(own / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
    _work(job.command)


def _run_under_agent(job: Job, logs: Path) -> tuple[int, int]:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=logs.name,
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, _work)(job.command)
    except ChildFailedError as error:
        return next(iter(error.failures.values())).exitcode, 0
    except SignalException as error:
        return 0, int(error.sigval)
    return 0, 0


def _children() -> set[str]:
    """Return the running processes that this process has started."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {
        child
        for task in tasks
        for child in task.read_text().split()
        if "State:\tZ" not in (Path("/proc") / child / "status").read_text()
    }


def _run_all(listed: Path, ended: Path) -> None:
    import lightning_mlc.commands.training  # noqa: F401 (once for all forks)

    found: list[Any] = []
    for number, job in enumerate(json.loads(listed.read_text())):
        found.append(asdict(_run_job(Job(**job), ended.parent / f"job{number}")))
    ended.write_text(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _run_all(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        from lightning_mlc.cli import main

        for command in json.loads(Path(sys.argv[1]).read_text()):
            if status := main(command):
                print("failed:", command, file=sys.stderr)
                sys.exit(status)
