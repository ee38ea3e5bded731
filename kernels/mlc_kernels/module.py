"""The loss as a module, for code that composes modules."""

from __future__ import annotations

from torch import Tensor, nn

from mlc_kernels.functional import Backend, Reduction, Scale, check_options, mlc_loss


class MLCLoss(nn.Module):
    """:func:`~mlc_kernels.functional.mlc_loss` with its options fixed. Has no parameters.

    Raises:
        ValueError: An option is out of place; at construction, not at the first batch.
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
        """Loss of ``representations`` (B, L, D) where ``mask`` (B, L) is True."""
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
