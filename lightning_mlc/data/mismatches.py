"""Choose for each example a response to another prompt (see :class:`~lightning_mlc.objectives.kto.KTO`).

The choice is made once for the whole data set. So it does not depend on batches or on the order of the examples, and
lengths and scores of the responses can be computed in advance.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np


class Mismatch(NamedTuple):
    """The place of an example's mismatched response."""

    row: int
    """Row of the example that it comes from."""
    response: Literal["chosen", "rejected"]
    """Which of that example's responses it is."""


class Mismatches(NamedTuple):
    """The mismatched responses of N examples."""

    rows: np.ndarray
    """(N,) int64: row of the example that each comes from."""
    rejected: np.ndarray
    """(N,) bool: whether it is that example's rejected response."""

    def of(self, row: int) -> Mismatch:
        """Return the mismatched response of the example in ``row``."""
        return Mismatch(int(self.rows[row]), "rejected" if self.rejected[row] else "chosen")


def mismatches(prompts: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Mismatches | None:
    """Choose the mismatched response of each example.

    It comes from the next example (the first follows the last) that has another prompt in the source language, and a
    response that differs from the example's own responses. If both responses of a pair differ, examples in even rows
    take the chosen one and examples in odd rows the rejected one, so that both kinds are used equally often.

    Args:
        prompts: (N,) int64: equal for equal prompts in the source language.
        chosen: (N,) int64: equal for equal chosen responses; 0 for a missing one.
        rejected: (N,) int64: equal for equal rejected responses; 0 for a missing one.

    Returns:
        The mismatched responses. None: at least one example has none.
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
            # Skip runs of equal values, because data sorted by prompt or response would take quadratic time otherwise.
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
    """Whether to take the rejected one of the ``others``, instead of the chosen one. None: neither can be taken."""
    for which in (False, True) if row % 2 == 0 else (True, False):
        if others[which] and others[which] not in own:
            return which
    return None


def _lengths_of_runs(values: Sequence[Hashable]) -> list[int]:
    """For each position, the number of equal values from there to the next different value or the end."""
    lengths = [1] * len(values)
    for index in range(len(values) - 2, -1, -1):
        if values[index] == values[index + 1]:
            lengths[index] = lengths[index + 1] + 1
    return lengths
