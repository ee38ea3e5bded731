"""Alignment objectives. One small module each, one interface: :class:`~lightning_mlc.objectives.base.Objective`."""

from lightning_mlc.objectives.base import Objective, Scores
from lightning_mlc.objectives.dpo import DPO
from lightning_mlc.objectives.sft import SFT

__all__ = ["DPO", "SFT", "Objective", "Scores"]
