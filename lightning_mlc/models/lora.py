"""Low-rank adapters through ``peft``."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.models.parts import beyond_text
from lightning_mlc.models.quantization import QuantizedFormat, keep_trainable, loading_options
from lightning_mlc.sources import ModelSource

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters instead of the weights. The reference is then the model without adapters.

    Args:
        r: Rank of the adapters, at least 1.
        alpha: Scale of the adapters. Their output is multiplied by ``alpha / r``.
        dropout: Dropout rate of the adapters' input, from 0 to below 1.
        target_modules: Names of the modules that get adapters, or ``all-linear`` for every linear layer except
            ``lm_head``.
        quantize: Store the frozen weights in 4 bits (``nf4``, QLoRA) or 8 bits (``int8``). null: full precision.
            Needs ``bitsandbytes``. The reference is the quantised model.

    Raises:
        UserError: ``r`` or ``dropout`` is out of range.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    quantize: QuantizedFormat | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError("model.lora.r", f"the rank must be at least 1, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError("model.lora.dropout", f"must be in [0, 1), got {self.dropout}")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, which a checkpoint can keep."""
        return asdict(self)

    def load_base(
        self,
        source: ModelSource,
        dtype: torch.dtype,
        device: torch.device,
        attn_implementation: str | None = None,
        weights: bool = True,
    ) -> PreTrainedModel:
        """Load the model that gets the adapters.

        Args:
            source: The model.
            dtype: Dtype of the weights (quantised: of the products).
            device: Device of a quantised model. Other models are loaded on the CPU.
            attn_implementation: Name of an attention implementation of transformers. None: transformers choose.
            weights: Whether to read the weights; see :func:`~lightning_mlc.models.loading.load_causal_lm`.

        Raises:
            UserError: The model cannot be loaded.
        """
        options = {} if self.quantize is None else loading_options(self.quantize, dtype, device)
        model = load_causal_lm(source, dtype, attn_implementation, weights, **options)
        keep_trainable(model)
        return model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide a warning inside the context: ``peft`` uses a name that ``transformers`` have renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def add_lora(model: PreTrainedModel, lora: LoRA, revision: str | None = None) -> PeftModel:
    """Freeze a model, and add trainable adapters.

    Args:
        model: The model.
        lora: Settings of the adapters.
        revision: Revision of the model on the hub, for the record of ``peft``.

    Raises:
        UserError: ``peft`` is not installed, no module has a name in ``target_modules``, or a module with such a name
            shares its weight with another module.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise UserError("model.lora", "needs the package peft; run `pip install peft`") from error
    uses: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)].append(name.removesuffix(".weight"))
    left_out = [rf"{re.escape(name)}(\..*)?" for name in (*beyond_text(model), *_not_only_linear(model))]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules="|".join(left_out) or None,
    )
    try:
        with quiet_peft():
            adapted: PeftModel = get_peft_model(model, config, revision=revision)
    except ValueError as error:
        raise UserError("model.lora.target_modules", first_line(error)) from error
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        # If it adapts all experts at once, the parameter has another name.
        weight = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
        shared = uses[id(weight)]
        if len(shared) > 1:
            raise UserError(
                "model.lora.target_modules",
                f"{shared[0]} and {shared[1]} share one weight, and an adapter on it would be in one of them alone; "
                "name other modules, or set model.lora to null",
            )
    return adapted


def _not_only_linear(model: PreTrainedModel) -> list[str]:
    """Names of linear modules that return more than a product, such as the router of Phi-MoE."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith(("transformers.models", "transformers_modules"))
        and not _returns_a_product(module)
    ]


@torch.no_grad()
def _returns_a_product(module: nn.Linear) -> bool:
    """Call the module to find out. Its class is not enough: Falcon's linear layers, for example, have their own."""
    weight = module.weight
    try:
        found: Any = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # the model's own code may need more arguments
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, module.out_features)
