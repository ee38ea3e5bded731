"""Two processes that are killed and resumed, data parallel or sharded, do bitwise the same as an uninterrupted run.

Everything runs through the real command, under the agent of ``torchrun``, over gloo on the CPU.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, metrics_rows, save_model, write_jsonl
from processes import Ended, Job, run_jobs

from lightning_mlc.checkpoints.format import read_checkpoint

pytestmark = pytest.mark.xdist_group("processes")

STRATEGIES = {"ddp": ["--trainer.strategy=ddp"], "fsdp2": ["--config=strategy/fsdp2"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """GPT-2, because it has dropout, and 16 rows to train on, some without a translation."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = example_rows(20)
    for row in rows[::3]:
        row["prompt"].pop("sw")
    return save_model(folder / "model", "gpt2"), write_jsonl(folder / "pairs.jsonl", rows)


def fit(inputs: tuple[Path, Path], out: Path, *more: str, **changes: Any) -> list[str]:
    """On two processes an epoch has optimizer steps of 3, 3 and 2 micro-batches."""
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": inputs[0],
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-3,
        "model.scheduler": "lightning_mlc.training.schedules.Warmup",
        "model.consistency.center": "true",
        "model.consistency.extractor_lr": 1e-3,
        "data.train_path": inputs[1],
        "data.cache_dir": inputs[1].parent / "cache",
        "data.val_share": 0.2,
        "data.batch_size": 1,
        "checkpoint.every_n_train_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.accumulate_grad_batches": 3,
        "trainer.max_epochs": 3,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return ["fit", *more, *(f"--{name}={value}" for name, value in options.items())]


def callback(name: str, **arguments: Any) -> str:
    return f"--trainer.callbacks+={json.dumps({'class_path': f'killing.{name}', 'init_args': arguments})}"


def kill(out: Path, name: str, batch: int, **more: Any) -> str:
    return callback("Kill", marker=str(out.with_name(f"{out.name}-{name}")), batch=batch, **more)


def run(jobs: dict[str, Job], scratch: Path) -> dict[str, Ended]:
    return dict(zip(jobs, run_jobs(list(jobs.values()), scratch), strict=True))


def told(ended: Ended) -> list[str]:
    """The messages of the processes that concern the user."""
    return [line for text in ended.stderr for line in text.splitlines() if line.startswith(("error: ", "ckpt_path: "))]


def assert_same_run(out: Path, expected: Path) -> None:
    """Weights, optimizer state, every loss and metric of every step to the last digit, and the names of files."""
    state, right = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (out, expected))
    assert state["global_step"] == right["global_step"] == 9
    for name, tensor in right["state_dict"].items():
        assert torch.equal(state["state_dict"][name], tensor), name
    for index, values in right["optimizer_states"][0]["state"].items():
        for name, value in values.items():
            assert torch.equal(state["optimizer_states"][0]["state"][index][name], value), (index, name)
    assert metrics_rows(out) == metrics_rows(expected)
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (out, expected)]
    assert names[0] == names[1]


# ---- killed, and asked to end -------------------------------------------------------------------------

NEVER = {"checkpoint__every_n_train_steps": 1000}


@pytest.fixture(scope="module")
def ended(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    """For each strategy, an undisturbed run and one that is ended several times, and how each part ended."""
    root = tmp_path_factory.mktemp("ended")
    jobs: dict[str, Job] = {}
    for name, strategy in STRATEGIES.items():
        out = root / name

        def resume(*more: str, out: Path = out, strategy: list[str] = strategy, **changes: Any) -> Job:
            return Job(fit(inputs, out, *strategy, "--ckpt_path=auto", *more, **changes))

        part = "part" if name == "fsdp2" else "file"
        jobs |= {
            f"{name}, undisturbed": Job(fit(inputs, root / f"{name}-undisturbed", *strategy)),
            f"{name}, killed before the first checkpoint": resume(kill(out, "first", 2)),
            f"{name}, both killed": resume(kill(out, "both", 4)),  # the second micro-batch of the second step
            # In validation after the third step, where the other process waits for this one in vain.
            f"{name}, one killed": resume(kill(out, "one", 5, rank=1)),
            f"{name}, killed while parts are written": resume(kill(out, "part", 1, while_writing=part)),
            f"{name}, killed while the end is written": resume(kill(out, "file", 1, while_writing="file")),
            f"{name}, torchrun asked to end": resume(
                kill(out, "term", 4, signal_number=15, rank=0, agent=True), **NEVER
            ),
            f"{name}, one asked to end": resume(kill(out, "usr1", 4, signal_number=10, rank=1), **NEVER),
            f"{name}, done": resume(),
        }
    out = root / "slurm"
    options = [*STRATEGIES["ddp"], "--ckpt_path=auto", "--data.num_workers=1"]
    end = kill(out, "usr1", 4, signal_number=10, rank=1)
    jobs["slurm, one asked to end"] = Job(fit(inputs, out, *options, end, **NEVER), slurm=True)
    jobs["slurm, done"] = Job(fit(inputs, out, *options), slurm=True)
    return root, run(jobs, root / "jobs")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_that_are_ended_go_on_as_if_nothing_had_happened(
    ended: tuple[Path, dict[str, Ended]], strategy: str
) -> None:
    root, all_ended = ended
    mine = {name.partition(", ")[2]: end for name, end in all_ended.items() if name.startswith(strategy)}
    assert mine["undisturbed"].status == mine["done"].status == 0, mine["done"]
    for name, end in mine.items():
        assert end.left == 0
        if "killed" in name:
            # If both processes end at once, the agent may first see the one that missed the other.
            assert end.status in (-signal.SIGKILL, 2), (name, end)
            assert all("another process of the run has ended" in line for line in told(end))
    torchrun, one = mine["torchrun asked to end"], mine["one asked to end"]
    assert (torchrun.signalled, one.status) == (signal.SIGTERM, 143)
    for end in (torchrun, one):
        assert [line.partition(";")[0] for line in told(end)] == ["error: stopped by a signal"]
    assert_same_run(root / strategy, root / f"{strategy}-undisturbed")


@pytest.mark.slow
def test_tasks_of_slurm_end_and_go_on_as_others_do(ended: tuple[Path, dict[str, Ended]]) -> None:
    """With the environment of ``srun``, which makes Lightning set other handlers."""
    root, all_ended = ended
    assert all_ended["slurm, one asked to end"].status == 143
    assert all_ended["slurm, done"].status == 0, all_ended["slurm, done"]
    assert_same_run(root / "slurm", root / "ddp-undisturbed")


# ---- other processes ----------------------------------------------------------------------------------

# Where a run stops in the middle of its second epoch, and where it resumes.
MOVES = {
    "ddp to one": ("ddp", "one"),
    "ddp to fsdp2": ("ddp", "fsdp2"),
    "fsdp2 to ddp": ("fsdp2", "ddp"),
    "one to ddp": ("one", "ddp"),
}


def on(layout: str, inputs: tuple[Path, Path], out: Path, *more: str, **changes: Any) -> Job:
    quick = {"trainer__max_epochs": 2, "trainer__limit_val_batches": 0, **changes}
    record = callback("Examples", path=str(out.with_name(f"{out.name}.txt")))
    if layout == "one":
        alone = {"trainer__devices": 1, "trainer__accumulate_grad_batches": 6, **quick}
        return Job(fit(inputs, out, record, *more, **alone), 1)
    return Job(fit(inputs, out, *STRATEGIES[layout], record, *more, **quick))


@pytest.fixture(scope="module")
def moved(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    root = tmp_path_factory.mktemp("moved")
    jobs = {"whole": on("ddp", inputs, root / "whole")}
    for name, (first, _) in MOVES.items():
        jobs[f"{name}, half"] = on(first, inputs, root / name, trainer__max_steps=4)
    # 6 of 16 examples of the second epoch are done.
    half = f"--ckpt_path={root}/ddp to one/checkpoints/step=4.ckpt"
    jobs["steps of 4"] = on("ddp", inputs, root / "refused", half, trainer__accumulate_grad_batches=2)
    for name, (_, second) in MOVES.items():
        jobs[name] = on(second, inputs, root / name, "--ckpt_path=last")
    # One run can write nothing, the others nothing more after some point.
    (root / "file").touch()
    jobs["no folder"] = on("ddp", inputs, root / "file" / "out")
    full = callback("FullDisk", batch=3)
    for name in STRATEGIES:
        jobs[f"full disk, {name}"] = on(name, inputs, root / f"full-{name}", full)
    return root, run(jobs, root / "jobs")


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVES)
def test_other_processes_train_on_the_same_examples_in_the_same_steps(
    moved: tuple[Path, dict[str, Ended]], name: str
) -> None:
    root, jobs = moved
    assert jobs[f"{name}, half"].status == jobs[name].status == 0, jobs[name]
    found, expected = (sorted_steps(root / f"{run}.txt") for run in (name, "whole"))
    assert found == expected
    assert len(expected) == 6
    assert len(told(jobs[name])) == 1
    assert "the steps have the same examples; sums are computed in another order" in told(jobs[name])[0]


def sorted_steps(path: Path) -> dict[int, list[str]]:
    """The examples of each optimizer step, on either process."""
    steps: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        step, *ids = line.split()
        steps.setdefault(int(step), []).extend(ids)
    return {step: sorted(ids) for step, ids in steps.items()}


@pytest.mark.slow
def test_steps_that_would_leave_examples_out_are_refused(moved: tuple[Path, dict[str, Ended]]) -> None:
    _, jobs = moved
    assert jobs["steps of 4"].status == 2
    [line] = told(jobs["steps of 4"])
    assert "after 6 examples of an epoch, in steps of 6; in steps of 4 some would be left out" in line


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_disk_that_is_full_ends_all_processes_with_one_line(
    moved: tuple[Path, dict[str, Ended]], strategy: str
) -> None:
    root, jobs = moved
    end = jobs[f"full disk, {strategy}"]
    assert (end.status, end.left) == (2, 0)
    assert not any("Traceback" in text for text in end.stderr)
    [line] = told(end)
    assert "error: checkpoint: cannot write" in line
    assert "File too large" in line
    folder = root / f"full-{strategy}" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 1


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_ends_all_processes_with_one_line(
    moved: tuple[Path, dict[str, Ended]],
) -> None:
    _, jobs = moved
    end = jobs["no folder"]
    assert (end.status, end.left) == (2, 0)
    [line] = told(end)
    assert line.startswith("error: out: cannot write to")
