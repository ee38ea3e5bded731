"""``python -m benchmarks.host``: what the host spends on a forward and backward pass of the MLC loss, by layer.

No GPU is needed: Triton talks to a stub that launches nothing (:mod:`benchmarks.stub_gpu`), and tensors are on the CPU.
So these are times of Python, PyTorch and Triton, not of a training step. They are compared within one run: launches by
plans with launches by Triton, and both with floors that no operator in Python can go below.

Hot calls are repeated in a row. A cold call comes after other work on other memory, as in a training step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.steps.reporting import target_lines
from benchmarks.steps.results import Target
from benchmarks.stub_gpu import StubGpu
from benchmarks.timing import Function
from lightning_mlc.files.paths import user_path
from mlc_kernels import fused, launch, mlc_loss

STUBBED = (
    "the driver and its launcher in C, which on a GPU take some microseconds for each launch",
    "the compiler behind Triton's parser",
    "the device: tensors and their allocator are a CPU's, and no thread of autograd's for a device takes part",
)
LANGUAGES, FEATURES = 10, 512
BOUNDS = {1: 0.52, 8: 0.56}
"""Largest ratio of a hot pass by plans to one by Triton, by number of prompts."""
WARM, IN_A_ROW = 5, 10
"""Calls before a sample of hot calls, and in it. A sample is shorter than a time slice: on a busy machine, most samples
of 50 calls were interrupted."""
OTHER_WORK = 1 << 21
"""Numbers of 4 bytes that are read and written before a cold call."""


class _Nothing(torch.autograd.Function):
    """The cost of an autograd function in Python, with the allocations of the loss."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return torch.empty_like(rows)


@dataclass(frozen=True)
class Variant:
    """A way to compute a loss and its gradient, and the patch under which it does so."""

    about: str
    loss: Callable[[Tensor], Tensor]
    patch: Callable[[], AbstractContextManager[object]] = nullcontext


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _loss(rows: Tensor) -> Tensor:
    return mlc_loss(rows, backend="triton")


def _nothing(rows: Tensor) -> Tensor:
    result: Tensor = _Nothing.apply(rows)  # type: ignore[no-untyped-call]
    return result


VARIANTS: dict[str, Variant] = {
    "by_triton": Variant("every launch by Triton", _loss, lambda: _replaced(launch, "_bind", None)),
    "by_plan": Variant("every launch by a plan", _loss),
    "no_launch": Variant("the same without its launches", _loss, lambda: _replaced(fused, "launch", lambda *_: None)),
    "function": Variant("floor: an autograd.Function that does nothing", _nothing),
    "sum": Variant("floor: x.sum() and its gradient", lambda rows: rows.sum()),
}


@dataclass(frozen=True)
class Times:
    """Microseconds of a forward and backward pass. The 5 % quantile is least disturbed by what else runs."""

    prompts: int
    variant: str
    hot: float
    hot_median: float
    cold: float
    cold_median: float
    rounds: int


def measure(prompts: int, rounds: int) -> list[Times]:
    """Measure every variant in ``rounds`` rounds, in a new order in each."""
    with StubGpu().installed():
        rows = torch.randn(prompts, LANGUAGES, FEATURES, generator=torch.Generator().manual_seed(0)).requires_grad_()
        passes = {name: _pass(variant, rows) for name, variant in VARIANTS.items()}
        hot = _samples(passes, rounds, _hot)
        cold = _samples(passes, rounds, _cold)
    return [
        Times(prompts, name, _low(hot[name]), statistics.median(hot[name]), _low(cold[name]),
              statistics.median(cold[name]), rounds)
        for name in VARIANTS
    ]  # fmt: skip


def _pass(variant: Variant, rows: Tensor) -> Callable[[Callable[[Function], float]], float]:
    """A function that measures the variant by a given measure, under its patch."""

    def run() -> object:
        return torch.autograd.grad(variant.loss(rows), rows)

    def measured(by: Callable[[Function], float]) -> float:
        with variant.patch():
            return by(run)

    return measured


def _samples(
    passes: Mapping[str, Callable[[Callable[[Function], float]], float]],
    rounds: int,
    by: Callable[[Function], float],
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in passes}
    shuffle = random.Random(0).shuffle
    order = list(passes)
    for name in order:  # compile, make plans
        passes[name](by)
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            found[name].append(passes[name](by))
    return found


def _hot(run: Function) -> float:
    for _ in range(WARM):
        run()
    start = time.perf_counter()
    for _ in range(IN_A_ROW):
        run()
    return (time.perf_counter() - start) / IN_A_ROW * 1e6


_others = torch.zeros(OTHER_WORK)
_matrix = torch.eye(8, dtype=torch.float64)[None].repeat(8, 1, 1)


def _cold(run: Function) -> float:
    _others.add_(1.0)
    for _ in range(3):
        torch.linalg.eigh(_matrix.requires_grad_())[0].sum().backward()  # other code of PyTorch's and of autograd's
    _matrix.grad = None
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _low(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=20, method="inclusive")[0]


def layers(times: list[Times], prompts: int) -> dict[str, tuple[float, float]]:
    """Hot and cold microseconds of each layer: differences between variants, from below."""
    of = {t.variant: (t.hot, t.cold) for t in times if t.prompts == prompts}

    def above(upper: str, lower: str) -> tuple[float, float]:
        return of[upper][0] - of[lower][0], of[upper][1] - of[lower][1]

    return {
        "autograd.Function and autograd.grad": of["function"],
        "checks, choice, allocations, layouts": above("no_launch", "function"),
        "launches, by plan": above("by_plan", "no_launch"),
        "launches, by Triton": above("by_triton", "no_launch"),
    }


def targets(times: list[Times]) -> list[Target]:
    """The bounds, and the ratios of cold passes, which have none."""
    found = []
    for prompts in dict.fromkeys(t.prompts for t in times):
        of = {t.variant: t for t in times if t.prompts == prompts}
        plan, triton = of["by_plan"], of["by_triton"]
        known = prompts in BOUNDS
        bound = BOUNDS.get(prompts, 1.0)
        found += [
            Target(f"hot, plan / Triton, B = {prompts}", bound, plan.hot / triton.hot, stated=known),
            Target(f"cold, plan / Triton, B = {prompts}", 1.0, plan.cold / triton.cold, stated=False),
            Target(f"hot, plan / Function, B = {prompts}", 1.0, plan.hot / of["function"].hot, stated=False),
            Target(f"cold, plan / Function, B = {prompts}", 1.0, plan.cold / of["function"].cold, stated=False),
        ]
    return found


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=str(__doc__).split("\n")[0])
    parser.add_argument("--prompts", default=[1, 8], help="B", type=int, nargs="+", metavar="N")
    parser.add_argument("--rounds", type=int, default=1000, help="at least 2")
    parser.add_argument("--out", type=user_path, required=True, help="folder for host.json")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    times = [found for prompts in options.prompts for found in measure(prompts, options.rounds)]
    ratios = targets(times)
    by_layer = {prompts: layers(times, prompts) for prompts in options.prompts}
    everything = {
        "environment": environment(torch.device("cpu")),
        "settings": {"languages": LANGUAGES, "features": FEATURES, "in_a_row": IN_A_ROW, "rounds": options.rounds},
        "load_average_of_one_minute": {"before": before, "after": os.getloadavg()[0]},
        "stubbed": STUBBED,
        "microseconds": [dataclasses.asdict(found) for found in times],
        "layers": {
            prompts: {name: dict(zip(("hot", "cold"), values, strict=True)) for name, values in found.items()}
            for prompts, found in by_layer.items()
        },
        "ratios": {target.name: target.value for target in ratios},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "host.json").write_text(json.dumps(everything, indent=1) + "\n")
    print("stubbed, and so not in these times:", *STUBBED, sep="\n  ")
    print(f"{'B':>3}  {'hot µs':>8} {'cold µs':>8}  forward + backward")
    for found in times:
        print(f"{found.prompts:>3}  {found.hot:>8.1f} {found.cold:>8.1f}  {VARIANTS[found.variant].about}")
    for prompts, layered in by_layer.items():
        for name, (hot, cold) in layered.items():
            print(f"{prompts:>3}  {hot:>8.1f} {cold:>8.1f}  layer: {name}")
    print(target_lines(ratios))
    print("wrote", options.out / "host.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
