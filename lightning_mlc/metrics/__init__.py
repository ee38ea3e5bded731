"""What is measured per language and between languages, exact on any number of processes."""

from lightning_mlc.metrics.collinearity import Collinearity, collinearity
from lightning_mlc.metrics.cosines import LanguageCosines
from lightning_mlc.metrics.per_example import ExampleMean
from lightning_mlc.metrics.per_language import LanguageMean

__all__ = ["Collinearity", "ExampleMean", "LanguageCosines", "LanguageMean", "collinearity"]
