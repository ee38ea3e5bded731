"""The multi-lingual consistency (MLC) loss of arXiv 2602.16660 as a PyTorch operator. It needs only torch."""

from mlc_kernels.functional import loss_floor, mlc_loss, singular_values
from mlc_kernels.hidden import mlc_loss_from_hidden
from mlc_kernels.module import MLCLoss

__version__ = "0.1.0"

__all__ = ["MLCLoss", "loss_floor", "mlc_loss", "mlc_loss_from_hidden", "singular_values"]
