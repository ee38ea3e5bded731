"""Metrics per language and between languages. Their values do not depend on the number of processes."""

from lightning_mlc.metrics.collinearity import Collinearity
from lightning_mlc.metrics.cosines import LanguageCosines
from lightning_mlc.metrics.layer_choice import LayerChoice, choose_layer
from lightning_mlc.metrics.per_example import ExampleMean
from lightning_mlc.metrics.per_language import LanguageMean, language_differences
from lightning_mlc.metrics.separation import Separation
from lightning_mlc.metrics.silhouette import Silhouettes, silhouette, silhouettes
from lightning_mlc.metrics.verdicts import PairwiseAgreement, SafetyRates

__all__ = [
    "Collinearity",
    "ExampleMean",
    "LanguageCosines",
    "LanguageMean",
    "LayerChoice",
    "PairwiseAgreement",
    "SafetyRates",
    "Separation",
    "Silhouettes",
    "choose_layer",
    "language_differences",
    "silhouette",
    "silhouettes",
]
