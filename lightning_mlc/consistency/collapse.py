"""Whether different prompts stay apart, or fall onto one line together with their translations.

The MLC loss asks that the translations of a prompt lie on one line. One state for all prompts satisfies it as well as
one state for each prompt does.

Measured is the mean cosine between two different prompts in the same language. It is 1 if all prompts have one state.
Unlike the explained variance of several prompts, it does not depend on their number: two prompts always explain half of
each other. It has a sign, because two opposite states are two states. And a sum of unit vectors is enough to compute
it, so the prompts may come in micro-batches and on several processes: with n unit vectors of sum S, the pairs have a
mean cosine of ``(|S|^2 - n) / (n (n - 1))``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_mlc.consistency.base import Observed
from lightning_mlc.consistency.measures import unit_rows
from lightning_mlc.processes import is_first

BETWEEN_PROMPTS = "mlc/between_prompts"
"""Name of the mean cosine between the representations of different prompts."""
RAW_BETWEEN_PROMPTS = "mlc/raw/between_prompts"
"""The same of the hidden states themselves."""

logger = logging.getLogger("lightning_mlc")


def prompt_sums(states: Tensor, mask: Tensor) -> Tensor:
    """Add up the unit vectors of B prompts, and count them. It does not wait for the device.

    Args:
        states: (B, L, D) floating point: a state for each language. A state of zeros counts as missing.
        mask: (B, L) bool, False where a prompt lacks the language.

    Returns:
        (L, D + 1): for each language the sum of the unit vectors, and their number, in float64 (float32 on a device
        without float64). Such sums of different prompts may be added.
    """
    unit, usable = unit_rows(states.detach(), mask)
    return torch.cat([unit, usable[:, :, None].to(unit.dtype)], dim=2).sum(0)


def sums_of_step(observed: Observed) -> dict[str, Tensor]:
    """Return the :func:`prompt_sums` of representations and of hidden states, by the names of their mean cosines."""
    assert observed.representations is not None
    assert observed.policy.states is not None
    return {
        BETWEEN_PROMPTS: prompt_sums(observed.representations, observed.present),
        RAW_BETWEEN_PROMPTS: prompt_sums(observed.policy.states, observed.present),
    }


def prompt_cosines(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the cosines of all pairs of different prompts in the same language.

    Args:
        sums: (L, D + 1) of :func:`prompt_sums`.

    Returns:
        (): the sum of the cosines.
        (): the number of pairs; 0 if no language has two prompts.
    """
    total, count = sums[:, :-1], sums[:, -1]
    return (total.square().sum() - count.sum()) / 2, (count * (count - 1)).sum() / 2


def mean_prompt_cosine(sums: Tensor) -> Tensor:
    """Compute the mean cosine between different prompts in the same language.

    Args:
        sums: (L, D + 1) of :func:`prompt_sums`.

    Returns:
        (): the mean, NaN if no language has two prompts.
    """
    cosines, pairs = prompt_cosines(sums)
    # The sum of no cosines may differ from 0 by rounding, and the quotient would be infinite.
    return torch.where(pairs > 0, cosines / pairs, float("nan"))


class CollapseWatch:
    """Warns once if the states of different prompts become one.

    Args:
        remedy: What to do then, for the warning.
    """

    LOOKS_AT = ("mlc/raw/explained_variance", RAW_BETWEEN_PROMPTS)
    """Names of the values that it looks at."""
    ALIKE = 0.98
    """Explained variance, and cosine between prompts, from which all states count as one."""
    SHRUNK = 0.25
    """Share of the first distance between prompts that is left when a warning is due. Without it, a model whose states
    are nearly alike from the start, because of a large common direction, would be warned of before it is trained."""

    def __init__(self, remedy: str) -> None:
        self._remedy = remedy
        self._first: float | None = None
        """1 minus the cosine between prompts that was seen first."""
        self._has_warned = False

    def look(self, logged: Mapping[str, float]) -> None:
        """Warn if translations have become alike, and different prompts with them.

        Args:
            logged: Values that are logged, by name.
        """
        variance, cosine = (logged.get(name) for name in self.LOOKS_AT)
        if self._has_warned or variance is None or cosine is None:
            return
        distance = 1 - cosine
        if self._first is None:
            self._first = distance
        if variance < self.ALIKE or cosine < self.ALIKE or distance > self.SHRUNK * self._first:
            return
        self._has_warned = True
        if is_first():  # all processes see the same values
            logger.warning(
                "All prompts fall onto one line: the mean cosine between the hidden states of different prompts is "
                "%.3f (%.3f at first), and the explained variance of translations is %.3f. The model comes to treat "
                "every prompt alike, ordinary ones too; %s",
                cosine,
                1 - self._first,
                variance,
                self._remedy,
            )
