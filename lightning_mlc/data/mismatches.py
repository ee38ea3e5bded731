"""For each example a response to another prompt: what a model makes of responses in general (see KTO).

They are fixed for the whole data set. So they do not depend on how a step is cut into batches or on the order of
the examples, and whatever is known of them beforehand stays true.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np


class Mismatch(NamedTuple):
    """Where an example's mismatched response is."""

    row: int
    response: Literal["chosen", "rejected"]


class Mismatches(NamedTuple):
    """The mismatched responses of N examples."""

    rows: np.ndarray
    """(N,) int64, the row each is taken from."""
    rejected: np.ndarray
    """(N,) bool, whether it is that row's rejected response."""

    def of(self, row: int) -> Mismatch:
        """That of the example in ``row``."""
        return Mismatch(int(self.rows[row]), "rejected" if self.rejected[row] else "chosen")


def mismatches(prompts: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Mismatches | None:
    """The mismatched response of each example; None if one of them has none.

    It is that of the next example (after the last comes the first) that answers another prompt in the source
    language, and differently from the example's own responses. Of a pair it is the chosen one for every other
    example and the rejected one for the others, if that differs: as many of each as there are among the responses.

    Args:
        prompts: (N,) int64, equal for equal prompts in the source language.
        chosen: (N,) int64, equal for equal chosen responses; 0 where there is none.
        rejected: (N,) int64, the same of rejected responses.
    """
    of_prompt: list[int] = prompts.tolist()
    responses: list[tuple[int, int]] = list(zip(chosen.tolist(), rejected.tolist(), strict=True))
    same_prompt, same_responses = _lengths_of_runs(of_prompt), _lengths_of_runs(responses)
    count = len(of_prompt)
    rows, is_rejected = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
    for row, own in enumerate(responses):
        other = row + 1
        while other < row + count:
            index = other % count
            # Whole runs are skipped: data sorted by prompt or by response would take quadratic time.
            if of_prompt[index] == of_prompt[row]:
                other += same_prompt[index]
            elif responses[index] == own:
                other += same_responses[index]
            elif (which := _differing(responses[index], own, row)) is None:
                other += 1
            else:
                rows[row], is_rejected[row] = index, which
                break
        else:
            return None
    return Mismatches(rows, is_rejected)


def _differing(others: tuple[int, int], own: tuple[int, int], row: int) -> bool | None:
    """Whether the rejected (or else the chosen) of the ``others`` is to be taken; None if neither can be."""
    for which in (False, True) if row % 2 == 0 else (True, False):
        if others[which] and others[which] not in own:
            return which
    return None


def _lengths_of_runs(values: Sequence[Hashable]) -> list[int]:
    """For each of ``values`` the number of equal ones from there on, up to the next different one or the end."""
    lengths = [1] * len(values)
    for index in range(len(values) - 2, -1, -1):
        if values[index] == values[index + 1]:
            lengths[index] = lengths[index + 1] + 1
    return lengths
