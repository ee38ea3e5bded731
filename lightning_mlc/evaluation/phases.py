"""One phase of an evaluation: answer what a journal lacks, show how far it is, and write each answer at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from lightning_mlc.errors import shortened
from lightning_mlc.evaluation.journal import Job, Journal
from lightning_mlc.evaluation.systems.endpoint import Unanswered
from lightning_mlc.progress.bars import track

Produce = Callable[[Collection[int]], Iterator[tuple[int, Mapping[str, Any]]]]
"""From the indices of the jobs that are done to the results of the others, as they come."""


def answered(journal: Journal, jobs: Sequence[Job]) -> set[int]:
    """Indices of the ``jobs`` that ``journal`` has.

    Raises:
        UserError: It has one of another input.
    """
    return {index for index, job in enumerate(jobs) if journal.has(job)}


def fill(journal: Journal, jobs: Sequence[Job], produce: Produce, title: str, console: Console) -> None:
    """Ask ``produce`` for what ``journal`` lacks of ``jobs``.

    Raises:
        Unanswered: Some of it did not come.
    """
    done = answered(journal, jobs)
    with track(title, len(jobs), "prompts", done=len(done), console=console) as progress:
        try:
            for index, result in produce(done):
                journal.add(jobs[index], result)
                progress.advance()
        except Unanswered as error:
            first = next(job.key for job in jobs if not journal.has(job))
            raise Unanswered(
                shortened(title, 50),
                f"{error.text} (the first is '{shortened(first.id, 20)}' ({first.language}) of "
                f"'{shortened(first.set, 20)}')",
            ) from error
