"""One phase of an evaluation: compute what a journal lacks, show progress, and write each result at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from lightning_mlc.errors import shortened
from lightning_mlc.evaluation.journal import Job, Journal
from lightning_mlc.evaluation.systems.endpoint import Unanswered
from lightning_mlc.progress.bars import track

Produce = Callable[[Collection[int]], Iterator[tuple[int, Mapping[str, Any]]]]
"""Takes the indices of the jobs that are done, and yields index and result of each other job as soon as it is done."""


def answered(journal: Journal, jobs: Sequence[Job]) -> set[int]:
    """Indices of the ``jobs`` that ``journal`` has a record for.

    Raises:
        UserError: A record was computed from another input.
    """
    return {index for index, job in enumerate(jobs) if journal.has(job)}


def fill(journal: Journal, jobs: Sequence[Job], produce: Produce, title: str, console: Console) -> None:
    """Compute the results of ``jobs`` that ``journal`` lacks, and add them to it.

    Args:
        journal: The open journal.
        jobs: All jobs of the phase.
        produce: Computes the results.
        title: Label of the progress bar.
        console: Where progress is shown.

    Raises:
        Unanswered: An endpoint did not answer some requests.
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
