"""Which rows a step runs of each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ResponsesIn = Literal["none", "source", "all"]
"""Languages in which the prompts of a training step are followed by responses: the language's own responses where the
example has them, else those of the source language."""


@dataclass(frozen=True)
class RowPlan:
    """Which rows a step runs of each example. It follows from the objective and the consistency terms.

    Args:
        rejected: Whether rejected responses are run in addition to chosen ones.
        responses_in: Languages in which training prompts are followed by responses; other prompts are run alone.
        translations: Whether any training step runs prompts in other languages than the source.
        mismatched: Whether responses to other prompts are run, which some objectives compare with.
        positions: Number of first positions of the source language's response at which next-token distributions are
            compared between languages. 0: none are. Position 1 is the end of the prompt; for more, the response's
            first ``positions - 1`` tokens are run after each prompt.
        answered: Number of harmful and of ordinary prompts that every validation answers, in every language.
    """

    rejected: bool = True
    responses_in: ResponsesIn = "source"
    translations: bool = True
    mismatched: bool = False
    positions: int = 0
    answered: int = 0
