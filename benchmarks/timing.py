"""Time several variants of one computation so that they can be compared.

Variants are interleaved: each round runs every variant once, in a shuffled order, so that a clock that
changes or a neighbour that wakes up hits all of them alike. Reported are quantiles over rounds, for the mean of a noisy
machine says little.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Function = Callable[[], object]


class Quantiles(NamedTuple):
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    rounds: int


def wall_times(
    variants: Mapping[str, Function], device: torch.device, seconds: float = 1.0, most_rounds: int = 200
) -> dict[str, Quantiles]:
    """What a caller waits for one call and its result, for each of ``variants``.

    Args:
        variants: Functions without arguments, by name. Each is called twice beforehand.
        device: Where they run; each call ends with its synchronisation.
        seconds: Rounds go on for about so long for each variant (3 of them at least, ``most_rounds`` at most).
        most_rounds: See there.
    """

    def timed(function: Function) -> float:
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start

    for function in variants.values():  # compile, allocate, warm up
        timed(function)
    slowest = sum(timed(function) for function in variants.values())
    rounds = max(3, min(most_rounds, int(seconds * len(variants) / max(slowest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(timed(variants[name]))
    return {name: quantiles(values) for name, values in samples.items()}


def graph_times(calls: Mapping[str, list[Function]], device: torch.device, rounds: int = 20) -> dict[str, Quantiles]:
    """What the GPU takes for one call, without what Python and the launch take.

    Args:
        calls: By name, calls on different inputs, which together are larger than the cache. All of a name are
            captured into one CUDA graph, and its replay is timed.
        device: A CUDA device.
        rounds: Replays of each.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    with torch.cuda.device(device):
        for name, functions in calls.items():
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # as capturing asks for: what is lazy happens before it
                for function in functions[:2]:
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for function in functions:
                    function()
            graphs[name] = graph, len(functions)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, (graph, count) in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) / 1e3 / count)
    return {name: quantiles(values) for name, values in samples.items()}


def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second, read and written, of a copy of ``size`` bytes on ``device``."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / wall_times({"copy": lambda: target.copy_(source)}, device)["copy"].median


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """Most memory that a call holds beyond what was held before it; None on devices that do not tell."""
    if device.type != "cuda":
        return None
    function()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantiles(samples: list[float]) -> Quantiles:
    """Median, 20 % and 80 % quantiles of two or more ``samples``."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Quantiles(statistics.median(samples), fifths[0], fifths[3], len(samples))
