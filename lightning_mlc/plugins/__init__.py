"""The MLC loss in other people's training: TRL, the Trainer of transformers, and plain loops. Needs no Lightning."""

from lightning_mlc.plugins.datasets import mlc_dataset
from lightning_mlc.plugins.regularizer import MLCRegularizer
from lightning_mlc.plugins.trainer import MLCTrainerMixin, add_mlc

__all__ = ["MLCRegularizer", "MLCTrainerMixin", "add_mlc", "mlc_dataset"]
