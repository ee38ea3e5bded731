"""Low-rank adapters through ``peft``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from lightning_mlc.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters instead of the weights; the reference is then the model without them.

    Args:
        r: Rank of the adapters.
        alpha: Scale of the adapters; their output is multiplied by ``alpha / r``.
        dropout: Dropout on the adapters' input.
        target_modules: Names of the modules that get adapters, or ``all-linear`` for every linear layer
            but ``lm_head``.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.lora.r: the rank must be at least 1, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.lora.dropout: must be in [0, 1), got {self.dropout}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint keeps them."""
        return asdict(self)


def add_lora(model: PreTrainedModel, lora: LoRA) -> PeftModel:
    """``model`` frozen, with trainable adapters.

    Raises:
        UserError: ``peft`` is not installed, or no module has a name in ``target_modules``.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("model.lora: needs the package peft; run `pip install peft`") from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        adapted: PeftModel = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from error
    return adapted
