"""``python -m benchmarks.train_step``: cost of a training step, compared with the published recipe and with TRL.

Four variants train on the same examples from the same weights: ``published`` (:mod:`benchmarks.published`), ``dpo``
and ``dpo_mlc`` (this project without and with the consistency term) and ``trl`` if it is installed. Each variant has
its own process, and on a CPU they take their steps in turn. A ratio is the median over steps of the ratio on the
same examples.

``--parity`` first runs ``published`` and ``dpo_mlc`` in float32, with the same mathematics, and compares their losses
over some steps. If they disagree, no ratio is stated.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, SMOLLM2, write_random_model
from benchmarks.published import Pair
from benchmarks.steps.measuring import VariantMeasurements, disagreement, measure_variants
from benchmarks.steps.parity import PARITY_BOUND, Parity, check_parity
from benchmarks.steps.reporting import results_table, target_lines, write
from benchmarks.steps.results import Result, Target, is_usual, result, targets
from benchmarks.steps.settings import StepSettings, plan_pairs
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.errors import UserError
from lightning_mlc.files.paths import user_path
from lightning_mlc.sources import ModelSource

COMPARED = ("published", "dpo", "dpo_mlc", "trl")

SHARED_OPTIONS = {
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
"""Options of ``fit`` that must be the same for all variants, and the options of this command that set them."""


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=user_path, required=True, help="folder for train_step.json, .csv, .png and logs")
    parser.add_argument("--variants", nargs="+", default=list(COMPARED), choices=list(COMPARED))
    parser.add_argument(
        "--model", default=SMOLLM2.name_or_path, help="as model.name_or_path; by default SmolLM2-135M-Instruct"
    )
    parser.add_argument("--gguf_file", help="as model.gguf_file")
    parser.add_argument(
        "--architecture",
        choices=list(ARCHITECTURES),
        help="random weights of this shape; tokenizer of --model",
    )
    parser.add_argument("--data", default="sample", help="preference pairs, as data.train_path")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="that of the responses first; by default all")
    parser.add_argument("--batch_size", type=int, default=2, metavar="N", help="pairs in a step")
    parser.add_argument("--warm_up", type=int, default=3, metavar="N", help="first steps, which are not measured")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps, after the warm-up")
    parser.add_argument("--counted_steps", type=int, default=3, metavar="N", help="timed steps whose FLOPs are counted")
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true", "bf16-true"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in all variants")
    parser.add_argument("--max_prompt_length", type=int, default=512, metavar="N", help="in tokens")
    parser.add_argument("--max_response_length", type=int, default=512, metavar="N", help="in tokens")
    parser.add_argument("--learning_rate", type=float, default=5e-7)
    parser.add_argument("--seed", type=int, default=42, help="seed of the order of examples and of the extractor")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of `lightning-mlc fit`, for dpo and dpo_mlc"
    )
    parser.add_argument(
        "--one_by_one",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one variant after the other instead of in turn; default on a GPU, whose memory seldom fits all variants",
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
    """Check the options that the parser cannot check.

    Raises:
        UserError: An option is invalid.
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
        if key in SHARED_OPTIONS:
            raise UserError("--set", f"{key} must be the same for all variants; use {SHARED_OPTIONS[key]}")
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise UserError("--out", f"{out} is a file; give a folder")


def languages_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the requested languages, or all languages of the first row, starting with English."""
    if options.languages:
        return tuple(options.languages)
    first = next(parse_rows(read_rows(options.data, "--data"), "en"))
    return ("en", *(language for language in first.prompts if language != "en"))


def settings_of(options: argparse.Namespace) -> StepSettings:
    """Return the settings that ``options`` describe."""
    return StepSettings(
        model=ModelSource(options.model, gguf_file_of(options)),
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


def gguf_file_of(options: argparse.Namespace) -> str | None:
    """Return the requested GGUF file; by default that of SmolLM2."""
    return options.gguf_file or (SMOLLM2.gguf_file if options.model == SMOLLM2.name_or_path else None)


def say(what: str) -> None:
    """Replace the status line, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


@dataclass
class Outcome:
    """Everything that was measured so far."""

    measured: dict[str, VariantMeasurements]
    results: list[Result]
    parity: Parity | None
    wrong: list[str]
    """Messages about variants that did not train on the planned examples."""
    targets: list[Target] | None
    """None if the variants do not compute the same, because ratios would then mean nothing."""
    paths: list[Path]


@contextmanager
def prepared(options: argparse.Namespace, settings: StepSettings) -> Iterator[tuple[StepSettings, Path]]:
    """Yield the settings with the model to train, and a temporary folder.

    Raises:
        UserError: The model of ``--architecture`` could not be made.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.architecture:
            say(f"{options.architecture}: random weights")
            maker = multiprocessing.get_context("spawn").Process(  # in this process the weights would stay in memory
                target=write_random_model, args=(options.architecture, settings.model, folder / "model")
            )
            maker.start()
            maker.join()
            if maker.exitcode:
                raise UserError("--architecture", f"the model could not be made (status {maker.exitcode})")
            settings = replace(settings, model=ModelSource(str(folder / "model")))
        yield settings, folder


def measure_all(
    options: argparse.Namespace,
    settings: StepSettings,
    planned: list[list[Pair]],
    usual: bool,
    shown: Mapping[str, Any],
    folder: Path,
) -> Outcome:
    """Check parity, then measure the variants, and write the results after each group of variants.

    Args:
        options: Options of the command.
        settings: Settings that all variants share.
        planned: Pairs of each step.
        usual: Whether the targets against the published recipe apply to these settings.
        shown: Settings as they are written to the results.
        folder: Folder for temporary files.
    """
    out, device = options.out, torch.device(options.device)
    parity = check_parity(settings, options.parity, folder, out / "logs" / "parity", say) if options.parity else None
    variants = installed(options)
    absent = "not installed (pip install trl)"
    outcome = Outcome(
        {v: VariantMeasurements(failure=absent) for v in options.variants if v not in variants},
        [],
        parity,
        [],
        None,
        [],
    )
    for together in [variants] if shown["in_turn"] or not variants else [[variant] for variant in variants]:
        measured = outcome.measured
        measured |= measure_variants(together, settings, planned, out / "logs", say)
        outcome.wrong = disagreement(measured, planned)
        done = [name for name in options.variants if name in measured and not measured[name].failure]
        outcome.results = [result(name, measured[name], planned) for name in done]
        trusted = (parity is None or parity.holds) and not outcome.wrong
        outcome.targets = targets(measured, usual) if trusted else None
        # After each group, so that results survive an interruption.
        outcome.paths = write(out, device, shown, measured, outcome.results, parity, outcome.targets)
    return outcome


def installed(options: argparse.Namespace) -> list[str]:
    """Return the requested variants, without TRL if it is not installed."""
    return [v for v in options.variants if v != "trl" or importlib.util.find_spec("trl")]


def print_report(outcome: Outcome, load: float) -> None:
    """Print the results; ``load`` is the load average before the first step."""
    print("wrote", *outcome.paths, sep="\n  ")
    print(results_table(outcome.results))
    for name, measured in outcome.measured.items():
        if measured.failure:
            print(f"{name:<10} {measured.failure}")
    if (parity := outcome.parity) is not None:
        verdict = "agree" if parity.holds else "DISAGREE"
        print(
            f"losses of published and dpo_mlc in float32 {verdict}: they differ by up to "
            f"{parity.largest_difference:.1e} over {len(parity.published)} steps, allowed {PARITY_BOUND:.0e}"
        )
    cpus = os.cpu_count() or 1
    if load > cpus / 2:
        print(f"the machine was busy before the first step (load average {load:.1f}, {cpus} CPUs): times mean little")
    for line in outcome.wrong:
        print(line)
    if outcome.targets is None:
        print("no ratio is stated, because the variants do not compute the same")
    else:
        print(target_lines(outcome.targets))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status, 1 if a variant failed or the variants do not compute the same."""
    options = parse(args)
    try:
        check(options)
        load = os.getloadavg()[0]
        settings = settings_of(options)
        planned, usual = plan_pairs(settings), is_usual(settings)
        options.out.mkdir(parents=True, exist_ok=True)
        in_turn = options.device == "cpu" if options.one_by_one is None else not options.one_by_one
        shown = {
            "name": options.architecture or (gguf_file_of(options) or options.model),
            **{key: vars(options)[key] for key in vars(options) if key not in ("out", "architecture", "model", "data")},
            "data": Path(options.data).name,
            "languages": settings.languages,
            "in_turn": in_turn,
            "load_average": load,
        }
        with prepared(options, settings) as (settings, folder):
            outcome = measure_all(options, settings, planned, usual, shown, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say("")
    print_report(outcome, load)
    failed = any(measured.failure for name, measured in outcome.measured.items() if name in installed(options))
    return int(failed or outcome.targets is None)


if __name__ == "__main__":
    sys.exit(main())
