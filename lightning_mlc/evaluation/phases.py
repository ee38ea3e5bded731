"""One phase of an evaluation: answer what a journal lacks, with a progress bar, and write each answer at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_mlc.evaluation.endpoint import Unanswered
from lightning_mlc.evaluation.journal import Job, Journal

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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=len(jobs), completed=len(done))
        try:
            for index, result in produce(done):
                journal.add(jobs[index], result)
                progress.advance(task)
        except Unanswered as error:
            first = next(job.key for job in jobs if not journal.has(job))
            raise Unanswered(
                title, f"{error} (the first without one is '{first.id}' ({first.language}) of the set '{first.set}')"
            ) from error
