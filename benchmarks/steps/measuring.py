"""Run the variants in processes of their own, which take their steps in turn."""

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

    def __init__(self, variant: str, settings: StepSettings, planned: list[list[Pair]], log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share this process's memory
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(variant, settings, planned, theirs, log))
        self._process.start()
        theirs.close()  # or the end of the process would not be the end of the pipe
        self.measured = VariantMeasurements(settings.warm_up)

    def hear(self) -> Any:
        """The next message; None where there will be none, and then `VariantMeasurements.failure` says why."""
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


def measure_variants(
    variants: Sequence[str],
    settings: StepSettings,
    planned: list[list[Pair]],
    logs: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, VariantMeasurements]:
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


def disagreement(measured: Mapping[str, VariantMeasurements], planned: list[list[Pair]]) -> list[str]:
    """Which variants did not train on the examples planned, in words."""
    return [
        f"{variant}: step {number + 1} was on other examples than those planned"
        for variant, found in measured.items()
        for number, (step, pairs) in enumerate(zip(found.steps, planned, strict=False))
        if tuple(step.ids) != tuple(pair.id for pair in pairs)
    ]
