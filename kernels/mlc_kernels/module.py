"""The loss as a ``torch.nn.Module``."""

from __future__ import annotations

from torch import Tensor, nn

from mlc_kernels.functional import Backend, Reduction, Scale, check_options, mlc_loss


class MLCLoss(nn.Module):
    """:func:`~mlc_kernels.functional.mlc_loss` with fixed options. The module has no parameters.

    Raises:
        ValueError: An option is invalid. The constructor raises this, not the first batch.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        scale: Scale = "top",
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_options(temperature, scale, reduction, backend)
        self.temperature = temperature
        self.scale: Scale = scale
        self.reduction: Reduction = reduction
        self.backend: Backend = backend

    def forward(self, representations: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of ``representations`` (B, L, D); ``mask`` (B, L) is False where a row is missing."""
        return mlc_loss(
            representations,
            mask,
            temperature=self.temperature,
            scale=self.scale,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, scale={self.scale!r}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )
