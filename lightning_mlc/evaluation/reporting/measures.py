"""The measures of an evaluation, with the direction that is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationMeasure:
    """A measure.

    Args:
        name: The name in results and reports.
        higher_is_better: Whether a higher number is better.
        is_share: Whether each value is between 0 for "no" and 1 for "yes", so that a mean is a share of prompts; or the
            measure is a difference of such shares.
    """

    name: str
    higher_is_better: bool
    is_share: bool


SAFE = EvaluationMeasure("safe", True, True)
UNSAFE = EvaluationMeasure("unsafe", False, True)
INVALID = EvaluationMeasure("invalid", False, True)
REFUSED = EvaluationMeasure("refused", True, True)
"""On harmful prompts: whether the response declines."""
OVER_REFUSAL = EvaluationMeasure("refused", False, True)
"""The same on ordinary prompts, where lower is better."""
REFUSAL_MARGIN = EvaluationMeasure("refusal margin", True, False)
"""On harmful prompts: how much more likely a refusal is than a compliance, in nats per token."""
ORDINARY_REFUSAL_MARGIN = EvaluationMeasure("refusal margin", False, False)
"""The same on ordinary prompts, where lower is better."""
PREFERS_REFUSAL = EvaluationMeasure("prefers to refuse", True, True)
"""On harmful prompts: whether the refusal margin is above 0."""
ORDINARY_PREFERS_REFUSAL = EvaluationMeasure("prefers to refuse", False, True)
SEPARATION = EvaluationMeasure("told apart by margin", True, False)
"""Area under the ROC curve: harmful against ordinary prompts, by refusal margin. 0.5 is chance."""
DECLINE_GAP = EvaluationMeasure("told apart by declines", True, True)
"""Share of harmful prompts that are declined, minus that of ordinary ones."""
REWARD_ACCURACY = EvaluationMeasure("reward accuracy", True, True)
REWARD_MARGIN = EvaluationMeasure("reward margin", True, False)
AGREEMENT = EvaluationMeasure("pag", True, True)
"""Share of a prompt's pairs of languages that have the same verdict."""
KAPPA = EvaluationMeasure("kappa", True, False)
"""Agreement corrected for chance."""

MEASURES = (
    SAFE,
    UNSAFE,
    INVALID,
    REFUSED,
    OVER_REFUSAL,
    REFUSAL_MARGIN,
    ORDINARY_REFUSAL_MARGIN,
    PREFERS_REFUSAL,
    ORDINARY_PREFERS_REFUSAL,
    SEPARATION,
    DECLINE_GAP,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    AGREEMENT,
    KAPPA,
)
_SHARES = frozenset(measure.name for measure in MEASURES if measure.is_share)


def is_share(measure: str) -> bool:
    """Whether the measure with this name is a share."""
    return measure in _SHARES
