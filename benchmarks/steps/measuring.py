"""Run each variant in its own process. The variants take their steps in turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.published import Pair
from benchmarks.steps.settings import StepSettings
from benchmarks.steps.turns import Counts, Failure, Memory, Step
from benchmarks.steps.variants import work


@dataclass
class VariantMeasurements:
    """Everything that a worker reported about its variant."""

    warm_up: int = 0
    """Number of first steps that are not timed."""
    steps: list[Step] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    """Counts of the first `timed` steps, perhaps not of all."""
    memory: Memory | None = None
    failure: str | None = None
    """Why the worker stopped early."""

    @property
    def timed(self) -> list[Step]:
        """The steps after the warm-up."""
        return self.steps[self.warm_up :]

    @property
    def seconds_and_flops(self) -> list[tuple[float, int]]:
        """Seconds and FLOPs of each counted step."""
        return [(step.seconds, count.flops) for step, count in zip(self.timed, self.counts, strict=False)]


class Worker:
    """A variant in its own process."""

    def __init__(self, variant: str, settings: StepSettings, planned: list[list[Pair]], log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share this process's memory
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(variant, settings, planned, theirs, log))
        self._process.start()
        theirs.close()  # otherwise the pipe would stay open after the process has ended
        self.measured = VariantMeasurements(settings.warm_up)

    def hear(self) -> Any:
        """Return the next message, or None if the worker failed; `VariantMeasurements.failure` then says why."""
        if self.measured.failure is None:
            try:
                message = self._pipe.recv()
            except EOFError:
                self._process.join()
                message = Failure(f"ended with status {self._process.exitcode} (-9: killed, usually out of memory)")
            if not isinstance(message, Failure):
                return message
            self.measured.failure = message.reason
        return None

    def ask(self) -> Any:
        """Request the next step or count, and return it; None if the worker failed."""
        if self.measured.failure is None:
            with contextlib.suppress(OSError):  # the process has ended, and `hear` finds out why
                self._pipe.send("next")
        return self.hear()

    def stop(self) -> None:
        """End the process, whether it is done or not."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def measure_variants(
    variants: Sequence[str],
    settings: StepSettings,
    planned: list[list[Pair]],
    logs: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, VariantMeasurements]:
    """Train with each of ``variants``, which take their steps in turn.

    Args:
        variants: Names from :data:`benchmarks.steps.variants.VARIANTS`.
        settings: Settings that all variants share.
        planned: Pairs of each step.
        logs: Folder for the log of each variant.
        say: Reports progress.

    Returns:
        The measurements by variant.
    """
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


def disagreement(measured: Mapping[str, VariantMeasurements], planned: list[list[Pair]]) -> list[str]:
    """Describe every step that did not train on the planned examples."""
    return [
        f"{variant}: step {number + 1} did not train on the planned examples"
        for variant, found in measured.items()
        for number, (step, pairs) in enumerate(zip(found.steps, planned, strict=False))
        if tuple(step.ids) != tuple(pair.id for pair in pairs)
    ]
