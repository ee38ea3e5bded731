"""Time several variants of one computation so that they can be compared.

A variant is called at one of three paces:

- cold (:func:`wall_times`): variants are interleaved. Each round runs every variant once, in a shuffled order. A
  changing clock or another busy process then affects all variants alike, and each finds the caches as the others left
  them.
- hot (:func:`hot_times`): one variant many times in a row, with a wait for the device after each call.
- queued (:func:`queued_times`): the same with one wait after many calls, so that the host runs ahead of the device.

Quantiles over the rounds are reported, because a mean says little about a noisy machine.
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


QUEUE = 20
"""The most calls that are queued before the device is waited for."""


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
    for function in variants.values():  # compile, allocate, warm up
        timed(function, device)
    slowest = sum(timed(function, device) for function in variants.values())
    rounds = max(3, min(most_rounds, int(seconds * len(variants) / max(slowest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(timed(variants[name], device))
    return {name: quantiles(values) for name, values in samples.items()}


def hot_times(
    variants: Mapping[str, Function], device: torch.device, seconds: float = 1.0, most_rounds: int = 200
) -> dict[str, Quantiles]:
    """Measure one call and its result, when the same variant is called again and again.

    Args:
        variants: As for :func:`wall_times`.
        device: The device that they run on. It is synchronised after each call.
        seconds: Approximate time of each variant.
        most_rounds: Largest number of calls of each variant.
    """
    return _in_rows(variants, device, seconds, most_rounds, 1)


def queued_times(
    variants: Mapping[str, Function], device: torch.device, seconds: float = 1.0, most_rounds: int = 200
) -> dict[str, Quantiles]:
    """Measure a call among many of the same variant, without waiting for the device in between.

    Args:
        variants: As for :func:`wall_times`.
        device: The device that they run on. It is synchronised after ``QUEUE`` calls; after fewer, at least two, of a
            slow variant.
        seconds: Approximate time of each variant.
        most_rounds: Largest number of such rows of calls of each variant.
    """
    return _in_rows(variants, device, seconds, most_rounds, QUEUE)


def _in_rows(
    variants: Mapping[str, Function], device: torch.device, seconds: float, most_rounds: int, longest: int
) -> dict[str, Quantiles]:
    """Measure rows of calls of one variant. Each variant has two turns, so that a slow moment rarely hits one alone."""
    once = {name: max(timed(function, device), 1e-9) for name, function in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for name in (*variants, *reversed(list(variants))):
        function = variants[name]
        if once[name] < seconds / 5:  # it was cold, and is again; this hardly changes the time of a slow one
            timed(function, device)
            once[name] = max(timed(function, device), 1e-9)
        calls = max(min(2, longest), min(longest, int(seconds / once[name] / 4)))
        rounds = max(2, min(most_rounds, int(seconds / once[name] / calls))) // 2
        samples[name] += [timed(function, device, calls) / calls for _ in range(rounds)]
    return {name: quantiles(values) for name, values in samples.items()}


def timed(function: Function, device: torch.device, calls: int = 1) -> float:
    """Return the seconds of ``calls`` calls with one wait for ``device`` at their end."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return time.perf_counter() - start


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
