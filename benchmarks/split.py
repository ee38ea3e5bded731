"""``python -m benchmarks.split``: which inputs gain from a split Gram matrix or from one warp, measured on a GPU.

Prints the times of all candidates for each size, and then the rows to paste into ``mlc_kernels.split.SPLITS``. Forward
and backward pass are timed in replays of a CUDA graph, which is the time of the GPU alone. For each size, every
candidate's gradient must first be that of the usual kernel, up to rounding.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel import loss_and_gradient, make_input
from benchmarks.kernel_report import Shape
from benchmarks.timing import Function, Quantiles, graph_times
from mlc_kernels import mlc_loss, split

LANGUAGES = {16: 10, 32: 32}
"""For each tile, the number of languages to measure."""
FEATURES = (512, 1024, 2048, 4096, 8192)
PROMPTS = (1, 8, 32, 128)
MOST_FEATURES = 1 << 20
PART = 512
"""Features of the smallest part."""
FRACTION = 0.05
"""A candidate must save this much of the usual time, so that noise makes no row."""
LAUNCH = 5e-6
"""Seconds that parts must save in addition, because they take one more launch, which the host needs about this long for
and a graph hides."""


class Candidate(NamedTuple):
    """As in :class:`mlc_kernels.split.Split`."""

    parts: int
    one_warp: bool

    def __str__(self) -> str:
        return f"{self.parts} part{'s' * (self.parts > 1)}{', one warp' * self.one_warp}"


USUAL = Candidate(1, False)
Size = tuple[int, int, int]
"""Tile, features and prompts."""
Timer = Callable[[Mapping[str, list[Function]], torch.device], Mapping[str, Quantiles]]


def candidates(size: Size, multiprocessors: int) -> list[Candidate]:
    """The usual kernel, and what may be faster: parts that are not small, and at most two programs a multiprocessor."""
    tile, features, prompts = size
    numbers = [1] + [n for n in (2, 4, 8, 16) if n <= math.ceil(features / PART) and n * prompts <= 2 * multiprocessors]
    return [Candidate(parts, one_warp) for parts in numbers for one_warp in ((False, True) if tile == 16 else (False,))]


def with_candidate(candidate: Candidate, function: Callable[[], Tensor]) -> Tensor:
    """Call ``function`` while every input has this choice."""
    every = range(1, MOST_FEATURES)
    before = split.SPLITS
    split.SPLITS = tuple(split.Split(tile, every, every, *candidate) for tile in LANGUAGES)
    try:
        return function()
    finally:
        split.SPLITS = before


def measure(
    size: Size, dtype: torch.dtype, device: torch.device, multiprocessors: int, timer: Timer
) -> dict[Candidate, float]:
    """Return the seconds of a forward and backward pass with each candidate.

    Raises:
        ArithmeticError: A candidate's gradient is not that of the usual kernel.
    """
    tile, features, prompts = size
    rows = make_input(Shape(prompts, LANGUAGES[tile], features, 0), dtype, device)
    copies = min(64, 1 + (1 << 27) // rows.nbytes)  # together larger than the cache
    inputs = [rows.detach().clone().requires_grad_() for _ in range(copies)]

    def run(candidate: Candidate, leaf: Tensor) -> Tensor:
        return with_candidate(candidate, lambda: loss_and_gradient(partial(mlc_loss, backend="triton"), leaf)[1])

    offered = candidates(size, multiprocessors)
    usual = run(USUAL, rows)
    for candidate in offered:
        difference = float((run(candidate, rows) - usual).abs().max() / usual.abs().max())
        if not difference <= 2 * torch.finfo(dtype).eps:  # each is rounded once; NaN is a difference, too
            raise ArithmeticError(f"the gradient with {candidate} differs by {difference:.1e} of its largest entry")
    times = timer({str(c): [partial(run, c, leaf) for leaf in inputs] for c in offered}, device)
    return {candidate: times[str(candidate)].median for candidate in offered}


def best(times: Mapping[Candidate, float]) -> Candidate:
    """The fastest candidate of those that save enough, or the usual kernel."""
    most = times[USUAL] * (1 - FRACTION)
    enough = [c for c, seconds in times.items() if seconds <= most - (LAUNCH if c.parts > 1 else 0.0)]
    return min(enough, key=lambda candidate: times[candidate], default=USUAL)


def table(found: Mapping[Size, Candidate], features: Sequence[int], prompts: Sequence[int]) -> list[split.Split]:
    """Rows for all inputs, from the best candidate for each measured size.

    A size stands for more features, up to the next measured number, and for fewer prompts, down to the measured number
    before, because a split pays the more, the more features there are for each multiprocessor.
    """
    rows = []
    for (tile, size, most), candidate in found.items():
        if candidate != USUAL:
            end = min((other for other in features if other > size), default=MOST_FEATURES)
            least = 1 + max((other for other in prompts if other < most), default=0)
            rows.append(split.Split(tile, range(size, end), range(least, most + 1), *candidate))
    return rows


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.split", description=str(__doc__).split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args(args)
    if not torch.cuda.is_available():
        print("error: there is no GPU here, and only a GPU can tell what to choose", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    about = torch.cuda.get_device_properties(device)
    found: dict[Size, Candidate] = {}
    for size in product(LANGUAGES, FEATURES, PROMPTS):
        name = f"L = {LANGUAGES[size[0]]}, D = {size[1]}, B = {size[2]}"
        try:
            times = measure(size, getattr(torch, options.dtype), device, about.multi_processor_count, graph_times)
        except ArithmeticError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        found[size] = best(times)
        told = "; ".join(f"{candidate}: {seconds * 1e6:.1f}" for candidate, seconds in times.items())
        print(f"{name}, microseconds: {told}", flush=True)
    print(f"\nRows for mlc_kernels/split.py, measured on {about.name} with {options.dtype}:")
    for row in table(found, FEATURES, PROMPTS):
        print(f"    {row},")
    return 0


if __name__ == "__main__":
    sys.exit(main())
