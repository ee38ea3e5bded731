"""Consistency terms: losses in addition to the objective, which keep the languages together."""

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.consistency.contrast import Contrast
from lightning_mlc.consistency.dco import DCO
from lightning_mlc.consistency.mlc import MLC
from lightning_mlc.consistency.mpo import MPO
from lightning_mlc.consistency.pairwise_cosine import PairwiseCosine
from lightning_mlc.consistency.representation import Representation
from lightning_mlc.consistency.retain import Retain
from lightning_mlc.consistency.self_distillation import SelfDistillation
from lightning_mlc.consistency.settings import Consistency
from lightning_mlc.consistency.source_cosine import SourceCosine

__all__ = [
    "DCO",
    "MLC",
    "MPO",
    "Consistency",
    "ConsistencyTerm",
    "Contrast",
    "Needs",
    "Observed",
    "PairwiseCosine",
    "Representation",
    "Retain",
    "SelfDistillation",
    "SourceCosine",
]
