"""``python -m benchmarks.plugin``: what the plug-in adds to a training step of TRL.

Four variants train on the same pairs from the same weights: ``trl`` (DPOTrainer), ``trl_mlc`` (with ``add_mlc``),
``trl_mlc_sum`` (both losses added in ``compute_loss``, which keeps two graphs in memory) and ``dpo_mlc``
(``lightning-mlc fit``). Each has a process of its own. On a CPU, two at a time take their steps in turn: those whose
times are compared first.

The bound of time: the plug-in adds to a step at most 1.1 times what the translations add to its arithmetic, by the
formulas of :mod:`lightning_mlc.models.flops`. The bound of memory: the step holds less than that with the sum.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import SMOLLM2
from benchmarks.environment import environment
from benchmarks.published import Pair
from benchmarks.steps.measuring import VariantMeasurements, disagreement, measure_variants
from benchmarks.steps.reporting import plot, results_table, target_lines
from benchmarks.steps.results import Target, ratio, result
from benchmarks.steps.settings import StepSettings, plan_pairs
from benchmarks.steps.trl_step import mlc_options
from benchmarks.train_step import gguf_file_of, languages_of, say
from lightning_mlc.errors import UserError
from lightning_mlc.files.paths import user_path
from lightning_mlc.models.flops import ModelFlops, Pass
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.models.precision import AUTO, Device, decide, try_both
from lightning_mlc.plugins import MLCRegularizer
from lightning_mlc.plugins.prompts import prompts_of_step
from lightning_mlc.sources import ModelSource, load_config, load_tokenizer

VARIANTS = ("trl", "trl_mlc", "trl_mlc_sum", "dpo_mlc")
AT_ONCE = {"cpu": 2, "cuda": 1}
"""Number of variants that are in memory together. SmolLM2-135M takes 5 GB for each on a CPU."""
TIME_BOUND = 1.1
"""Most time that the plug-in may add to a step, over the share of the translations' arithmetic."""
SAME_LOSS = {"32-true": 1e-4, "bf16-mixed": 3e-2}
"""Largest difference between the losses of the plug-in and of the sum. In bfloat16 a value has 8 bits."""


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of one step."""

    objective: float
    """DPO as TRL runs it: the policy forward and backward and the reference forward, with logits of all tokens."""
    translations: float
    """The prompts in all languages, forward and backward, without logits."""

    @property
    def share(self) -> float:
        """Of the translations, over the objective's."""
        return self.translations / self.objective


def arithmetic(flops: ModelFlops, pairs: Sequence[Pair], translations: Sequence[int]) -> Arithmetic:
    """Count the operations of a step, without padding.

    Args:
        flops: The formulas of the model.
        pairs: Those of the step.
        translations: Lengths of the step's prompts in tokens, in all languages.
    """
    objective = 0.0
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            length = len(pair.prompts[0]) + len(response)
            size = Pass(length, length, head_tokens=length)
            objective += 2 * flops.forward(size) + flops.backward(size)
    sizes = [Pass(length, length) for length in translations]
    return Arithmetic(objective, sum(flops.forward(size) + flops.backward(size) for size in sizes))


def arithmetic_of_steps(settings: StepSettings, planned: list[list[Pair]]) -> list[Arithmetic]:
    """Count the operations of each step.

    Raises:
        UserError: The formulas do not hold for the model.
    """
    flops = ModelFlops.of(load_causal_lm(settings.model, torch.float32))
    if flops is None:
        raise UserError("--model", "has layers whose operations the formulas do not count; use another one")
    mlc = MLCRegularizer(settings.data, load_tokenizer(settings.model), **mlc_options(settings))
    found = []
    for step, pairs in enumerate(planned):
        groups = prompts_of_step(len(mlc.groups), mlc.prompts_per_step, mlc.seed, step)
        found.append(arithmetic(flops, pairs, [len(prompt) for prompt in mlc.groups.sequences(groups)]))
    return found


def added_per_share(alone: VariantMeasurements, added: VariantMeasurements, steps: Sequence[Arithmetic]) -> float:
    """The median over steps of the time added over a step's time alone, over the translations' share."""
    pairs = zip(added.timed, alone.timed, steps[alone.warm_up :], strict=True)
    return statistics.median((ours.seconds / theirs.seconds - 1) / step.share for ours, theirs, step in pairs)


def targets(measured: Mapping[str, VariantMeasurements], steps: Sequence[Arithmetic]) -> list[Target]:
    """The bounds of time and memory, with what was measured of them."""
    alone, added, total, fit = (measured.get(name) for name in VARIANTS)
    both = alone is not None and added is not None and not alone.failure and not added.failure
    time = added_per_share(alone, added, steps) if both and alone is not None and added is not None else None
    return [
        Target("time that the plug-in adds, over the translations' share of operations", TIME_BOUND, time),
        Target("peak memory, trl_mlc / trl_mlc_sum", 1.0, ratio(added, total, _peak)),
        # Those that do not take their steps in turn have no bound of time.
        Target("time of a step, trl_mlc / trl_mlc_sum", 1.0, ratio(added, total, _seconds), stated=False),
        Target("time of a step, dpo_mlc / trl_mlc", 1.0, ratio(fit, added, _seconds), stated=False),
        Target("peak memory, dpo_mlc / trl_mlc", 1.0, ratio(fit, added, _peak), stated=False),
    ]


def largest_difference(measured: Mapping[str, VariantMeasurements]) -> float | None:
    """Between the losses of the plug-in and of the sum; None if one was not measured."""
    added, total = measured.get("trl_mlc"), measured.get("trl_mlc_sum")
    if added is None or total is None or not added.steps or not total.steps:
        return None
    return max(abs(a.loss - b.loss) for a, b in zip(added.steps, total.steps, strict=False))


def _seconds(measured: VariantMeasurements) -> list[float]:
    return [step.seconds for step in measured.timed]


def _peak(measured: VariantMeasurements) -> list[float]:
    return [] if measured.memory is None else [float(measured.memory.peak)]


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plugin", description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=user_path, required=True, help="folder for plugin.json, plugin.png and logs")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--model", default=SMOLLM2.name_or_path, help="as model.name_or_path; SmolLM2-135M-Instruct")
    parser.add_argument("--gguf_file", help="as model.gguf_file")
    parser.add_argument("--data", default="sample", help="preference pairs with translations, as data.train_path")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="that of the responses first; all if not given")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="pairs, and prompts, in a step")
    parser.add_argument("--warm_up", type=int, default=1, metavar="N", help="first steps, which are not measured")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="timed steps, after these")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", AUTO])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--max_prompt_length", type=int, default=128, metavar="N", help="in tokens")
    parser.add_argument("--max_response_length", type=int, default=64, metavar="N", help="in tokens")
    parser.add_argument("--seed", type=int, default=42, help="of the order of the pairs and of the extractor")
    options = parser.parse_args(args)
    for name, least in (("batch_size", 1), ("warm_up", 0), ("steps", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return options


def settings_of(options: argparse.Namespace) -> StepSettings:
    """The settings that ``options`` ask for, with ``auto`` decided."""
    model = ModelSource(options.model, gguf_file_of(options))
    precision = options.precision
    if precision == AUTO:
        device = Device.of("gpu" if options.device == "cuda" else "cpu", 1)
        width = int(load_config(model).get_text_config().hidden_size)
        choice = decide(device, lambda: try_both(width, device))
        precision = choice.precision
        print(f"precision: {precision}, because {choice.reason}")
    return StepSettings(
        model=model,
        data=options.data,
        languages=languages_of(options),
        batch_size=options.batch_size,
        warm_up=options.warm_up,
        steps=options.steps,
        counted_steps=0,
        precision=precision,
        device=options.device,
        gradient_checkpointing=False,
        learning_rate=5e-7,
        max_prompt_length=options.max_prompt_length,
        max_response_length=options.max_response_length,
        seed=options.seed,
        overrides=("model.consistency.extractor=frozen",),
    )


def shown(options: argparse.Namespace, settings: StepSettings, load: float) -> dict[str, Any]:
    """The settings as they are written: without paths, which are the machine's."""
    found = {key: value for key, value in vars(options).items() if key not in ("out", "model", "data")}
    return found | {
        "name": gguf_file_of(options) or options.model,
        "data": Path(options.data).name,
        "languages": settings.languages,
        "precision": settings.precision,
        "load_average": load,
    }


def write(
    folder: Path,
    shown: Mapping[str, Any],
    measured: Mapping[str, VariantMeasurements],
    planned: list[list[Pair]],
    steps: Sequence[Arithmetic],
    found: Sequence[Target] | None,
) -> str:
    """Write plugin.json and plugin.png, and return the results as a table."""
    done = [result(name, m, planned) for name, m in measured.items() if not m.failure]
    where = environment(torch.device(shown["device"]))
    everything = {
        "environment": where,
        "settings": dict(shown),
        "targets": None if found is None else [{**dataclasses.asdict(t), "met": t.met} for t in found],
        "largest_difference_of_losses": largest_difference(measured),
        "share_of_translations": statistics.median(step.share for step in steps),
        "operations": [dataclasses.asdict(step) for step in steps],
        "results": [dataclasses.asdict(row) for row in done],
        "failures": {name: m.failure for name, m in measured.items() if m.failure},
        "steps": {
            name: {"seconds": [s.seconds for s in m.steps], "loss": [s.loss for s in m.steps]}
            for name, m in measured.items()
        },
    }
    (folder / "plugin.json").write_text(json.dumps(everything, indent=1) + "\n")
    if done:
        title = f"One step of {shown['name']}, {shown['batch_size']} pairs, {len(shown['languages'])} languages"
        plot(done, folder / "plugin.png", f"{title}\n{where['device']}, {shown['precision']}")
    return results_table(done)


def main(args: Sequence[str] | None = None) -> int:
    """Measure, print and return the exit status: 1 if a variant failed, or the plug-in and the sum disagree."""
    options = parse(args)
    try:
        load = os.getloadavg()[0]
        settings = settings_of(options)
        planned = plan_pairs(settings)
        steps = arithmetic_of_steps(settings, planned)
        out: Path = options.out
        out.mkdir(parents=True, exist_ok=True)
        measured: dict[str, VariantMeasurements] = {}
        for start in range(0, len(options.variants), AT_ONCE[options.device]):
            together = options.variants[start : start + AT_ONCE[options.device]]
            measured |= measure_variants(together, settings, planned, out / "logs", say)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say("")
    wrong = disagreement(measured, planned)
    difference = largest_difference(measured)
    agree = difference is None or difference <= SAME_LOSS[settings.precision]
    found = targets(measured, steps) if agree and not wrong else None
    print(write(out, shown(options, settings, load), measured, planned, steps, found))
    print(f"translations: {statistics.median(step.share for step in steps):.2f} of the objective's operations")
    for line in [*wrong, *(f"{name}: {m.failure}" for name, m in measured.items() if m.failure)]:
        print(line)
    print("no ratio is stated of variants that do not do the same" if found is None else target_lines(found))
    return int(found is None or any(m.failure for m in measured.values()))


if __name__ == "__main__":
    sys.exit(main())
