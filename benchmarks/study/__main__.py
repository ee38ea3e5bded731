"""``python -m benchmarks.study``: train and measure a grid, or write the page of its results.

Several processes may work on one folder: give ``--processes``, or start the same command again, even on another
machine. Finished runs are not repeated, and training that was stopped resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.study.grid import BASE, StudyGrid, check_cells, read_grid
from benchmarks.study.measuring import Measurer, ordinary_prompts
from benchmarks.study.page import GRID, PAGE, ROWS, write_report
from benchmarks.study.runs import Runner, claim, stopped_by_signals
from benchmarks.study.split import HeldOutSplit, split_rows
from lightning_mlc.errors import Interrupted, UserError
from lightning_mlc.evaluation.journal import digest
from lightning_mlc.evaluation.systems.local import chat_of
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.files.paths import user_path, user_text
from lightning_mlc.progress.quiet import quiet_libraries


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=str(__doc__).split("\n")[0])
    parser.add_argument("--config", type=user_path, help="the grid, a YAML file such as those in benchmarks/studies")
    parser.add_argument("--out", type=user_path, help="folder of the study; an existing study is resumed")
    parser.add_argument("--data", help="preference rows, as data.train_path; some rows are held out")
    parser.add_argument(
        "--model", type=user_text, help="folder, hub id or GGUF file; by default that of the grid's configs"
    )
    parser.add_argument("--only", nargs="+", metavar="CELL", help="run only these cells of the grid")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run only these seeds of the grid")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="number of processes that share the work")
    parser.add_argument("--keep_weights", action="store_true", help="do not remove checkpoints after measuring them")
    parser.add_argument(
        "--report", type=user_path, metavar="FOLDER", help="write results and page of the study in FOLDER"
    )
    parser.add_argument("--page", type=user_path, default=PAGE, help="page that has marks for the study")
    parser.add_argument("--check", action="store_true", help="only check whether the grid can be run")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse(args)
    warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")
    logging.getLogger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    try:
        with quiet_libraries():
            return _main(options, sys.argv[1:] if args is None else args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 143 if isinstance(error, Interrupted) else 2


def _main(options: argparse.Namespace, args: Sequence[str]) -> int:
    if options.report is not None:
        print("wrote", *write_report(options.report, options.page), sep="\n  ")
        return 0
    if options.config is None:
        raise UserError("--config", "is not set; give a grid, such as benchmarks/studies/smollm2.yaml")
    if options.processes < 1:
        raise UserError("--processes", f"must be at least 1, got {options.processes}")
    grid = read_grid(options.config)
    for cell in options.only or ():
        if cell != BASE and cell not in grid.cells:
            raise UserError("--only", f"there is no cell '{cell}' (cells: {BASE}, {', '.join(grid.cells)})")
    for seed in options.seeds or ():
        if seed not in grid.seeds:
            raise UserError("--seeds", f"the grid has no seed {seed} (seeds: {', '.join(map(str, grid.seeds))})")
    own = {} if options.model is None else _model_options(options.model)
    models = set(check_cells(grid, own).values())
    if options.check:
        print(f"{grid.name}: {len(grid.cells)} cells x {len(grid.seeds)} seeds")
        return 0
    for name in ("data", "out"):
        if getattr(options, name) is None:
            raise UserError(f"--{name}", "is not set; see python -m benchmarks.study --help")
    if len(models) > 1:
        raise UserError("cells", f"must all train one model, but train {', '.join(sorted(models))}; give --model")
    model = System(BASE, options.model or models.pop(), grid.fit.get("model.chat_template"))
    runner, found = _prepare(grid, options, own, model)
    tasks = runner.tasks(options.only, options.seeds)
    runner.check(runner.tasks())  # all tasks, because the tables also show those that are not run now
    write_whole(runner.out / GRID, options.config.read_text(encoding="utf-8"))
    write_whole(runner.out / ROWS, json.dumps(found.rows) + "\n")
    print(f"{grid.name}: {len(tasks)} runs, " + ", ".join(f"{n} rows {name}" for name, n in found.rows.items()))
    with stopped_by_signals(), _others(options.processes - 1, args) as others:
        failures = runner.run(tasks)
    return int(bool(failures) or any(other.returncode for other in others))


@contextmanager
def _others(count: int, args: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start ``count`` more processes of this command. Waits for them in the end; stops them if this one is stopped."""
    command = [sys.executable, "-m", "benchmarks.study", *args, "--processes", "1"]
    started = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield started
    except BaseException:
        for process in started:
            process.terminate()
        raise
    finally:
        for process in started:
            process.wait()


def _prepare(
    grid: StudyGrid, options: argparse.Namespace, own: dict[str, str], model: System
) -> tuple[Runner, HeldOutSplit]:
    source = str(grid.fit.get("data.source_language", "en"))
    out: Path = options.out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError("--out", f"{out} is a file; give a folder")
    identity = model.identity
    chat = chat_of(model)
    out.mkdir(parents=True, exist_ok=True)
    ordinary = ordinary_prompts(grid.evaluation, source)
    with claim(out / "lock", wait=True):
        found = split_rows(
            options.data, grid.data, source, chat, out / "data", [prompts[source] for prompts in ordinary]
        )
    measurer = Measurer(found.heldout, grid.evaluation, source, grid.fit.get("data.languages"), ordinary)
    settings = {
        "model": identity,
        "data": found.digest,
        "evaluation": dataclasses.asdict(grid.evaluation),
        "ordinary": digest(measurer.ordinary),  # the prompts, because a file, or the sample, may have changed
        "device": str(measurer.device.type),
        "dtype": measurer.dtype,
    }
    own = {**own, "data.train_path": str(found.train), "data.val_share": "0"}
    return Runner(grid, out, own, model, settings, measurer, options.keep_weights), found


def _model_options(spec: str) -> dict[str, str]:
    """Return the options with which ``fit`` loads the model that ``evaluate`` would call ``spec``."""
    path = Path(spec)
    if path.exists():
        spec = str(path.resolve())
    return {"model.name_or_path": spec, "model.gguf_file": "null"}


if __name__ == "__main__":
    sys.exit(main())
