"""What a run measured, as its checkpoints keep it: the callback that measures writes it, the model card reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

CALLBACKS = "callbacks"
"""The entry of a checkpoint where Lightning keeps what callbacks remember, each under its ``state_key``."""
KEY = "EvaluationReport"
"""The ``state_key`` of what measures, whatever its class is called."""


class Measured(TypedDict):
    """Metrics by the names that loggers know, ``val/...``."""

    before: dict[str, float] | None
    """Of the initial model."""
    before_cosines: list[list[float]] | None
    """Between languages."""
    latest: dict[str, Any] | None
    """``step`` and ``results`` of the latest validation."""


def measured_in(checkpoint: Mapping[str, Any]) -> Measured | None:
    """What the run of a ``checkpoint`` measured; None if it measured nothing."""
    found: Measured | None = (checkpoint.get(CALLBACKS) or {}).get(KEY)
    return found
