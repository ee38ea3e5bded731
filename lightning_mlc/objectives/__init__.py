"""Alignment objectives: one module each, all with the interface :class:`~lightning_mlc.objectives.base.Objective`."""

from lightning_mlc.objectives.base import Objective, Responses, Scores, Term
from lightning_mlc.objectives.combined import Sum
from lightning_mlc.objectives.cpo import CPO
from lightning_mlc.objectives.dpo import DPO
from lightning_mlc.objectives.kto import KTO
from lightning_mlc.objectives.orpo import ORPO
from lightning_mlc.objectives.sft import SFT
from lightning_mlc.objectives.simpo import SimPO

__all__ = ["CPO", "DPO", "KTO", "ORPO", "SFT", "Objective", "Responses", "Scores", "SimPO", "Sum", "Term"]
