"""The results of a run in its checkpoints. The callback that measures writes them, and the model card reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

CALLBACKS = "callbacks"
"""The entry of a checkpoint in which Lightning keeps the states of callbacks, by their ``state_key``."""
KEY = "EvaluationReport"
"""The ``state_key`` of the callback that measures. A subclass with another name has the same key."""


class Measured(TypedDict):
    """Metrics by the names in the loggers, ``val/...``."""

    before: dict[str, float] | None
    """Results of the initial model."""
    before_cosines: list[list[float]] | None
    """Cosines between languages, of the initial model."""
    latest: dict[str, Any] | None
    """``step`` and ``results`` of the latest validation."""


def measured_in(checkpoint: Mapping[str, Any]) -> Measured | None:
    """The results of the run that wrote ``checkpoint``. None if it measured nothing."""
    found: Measured | None = (checkpoint.get(CALLBACKS) or {}).get(KEY)
    return found
