"""For each example a response to another prompt: what a model makes of responses in general (see KTO).

They are fixed for the whole data set. So they do not depend on how a step is cut into batches or on the order of
the examples, and whatever is known of them beforehand stays true.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

from lightning_mlc.data.records import Example


class Mismatch(NamedTuple):
    """Where an example's mismatched response is."""

    row: int
    response: Literal["chosen", "rejected"]


def mismatches(examples: Sequence[Example], source_language: str) -> list[Mismatch] | None:
    """The mismatched response of each example; None if one of them has none.

    It is that of the next example (after the last comes the first) that answers another prompt in the source
    language, and differently from the example's own responses. Of a pair it is the chosen one for every other
    example and the rejected one for the others, if that differs: as many of each as there are among the responses.
    """
    prompts = [repr(example.prompts[source_language]) for example in examples]
    responses = [example.responses for example in examples]
    same_prompt, same_responses = _lengths_of_runs(prompts), _lengths_of_runs(responses)
    count = len(examples)
    found = []
    for row, own in enumerate(responses):
        other = row + 1
        while other < row + count:
            index = other % count
            # Whole runs are skipped: data sorted by prompt or by response would take quadratic time.
            if prompts[index] == prompts[row]:
                other += same_prompt[index]
            elif responses[index] == own:
                other += same_responses[index]
            elif (response := _differing(examples[index], own, row)) is None:
                other += 1
            else:
                found.append(Mismatch(index, response))
                break
        else:
            return None
    return found


def _differing(example: Example, own: tuple[str, ...], row: int) -> Literal["chosen", "rejected"] | None:
    chosen: Literal["chosen", "rejected"] = "chosen"
    rejected: Literal["chosen", "rejected"] = "rejected"
    for name in (chosen, rejected) if row % 2 == 0 else (rejected, chosen):
        response = getattr(example, name)
        if response is not None and response not in own:
            return name
    return None


def _lengths_of_runs(values: Sequence[Hashable]) -> list[int]:
    """For each of ``values`` the number of equal ones from there on, up to the next different one or the end."""
    lengths = [1] * len(values)
    for index in range(len(values) - 2, -1, -1):
        if values[index] == values[index + 1]:
            lengths[index] = lengths[index + 1] + 1
    return lengths
