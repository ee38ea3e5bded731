"""Time several variants of one computation so that they can be compared.

Variants are interleaved: each round runs every variant once, in a shuffled order. A changing clock or another busy
process then affects all variants alike. Quantiles over the rounds are reported, because a mean says little about a
noisy machine.
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
    """Measure how long a caller waits for one call and its result, for each of ``variants``.

    Args:
        variants: Functions without arguments, by name. Each is called twice beforehand.
        device: The device that they run on. It is synchronised after each call.
        seconds: Approximate total time of each variant, which determines the number of rounds (at least 3).
        most_rounds: Largest number of rounds.
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
    """Measure the time that the GPU needs for one call, without the time of Python and of the launch.

    Args:
        calls: By name, calls on different inputs that together are larger than the cache. All calls of a name are
            captured into one CUDA graph, whose replay is timed.
        device: A CUDA device.
        rounds: Number of replays of each graph.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    with torch.cuda.device(device):
        for name, functions in calls.items():
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # lazy initialisation must happen before a graph is captured
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
    """Measure a copy of ``size`` bytes on ``device``: bytes read and written per second."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / wall_times({"copy": lambda: target.copy_(source)}, device)["copy"].median


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """Return the peak of memory during a call minus the memory in use before it; None where it is not reported."""
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
    """Wait until ``device`` has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantiles(samples: list[float]) -> Quantiles:
    """Return the median and the 20 % and 80 % quantiles of two or more ``samples``."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Quantiles(statistics.median(samples), fifths[0], fifths[3], len(samples))
