"""Load a causal LM, and choose the dtype of its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from lightning_mlc.errors import UserError
from lightning_mlc.sources import ModelSource, from_pretrained, load_config


def load_causal_lm(
    source: ModelSource,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    weights: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal LM in evaluation mode, on the CPU unless ``options`` say otherwise.

    Args:
        source: The model.
        dtype: Dtype of its weights.
        attn_implementation: Name of an attention implementation of transformers. None: transformers choose.
        weights: Whether to read the weights. If False, only the configuration is read, and the model is on the
            ``meta`` device, which keeps shapes only.
        **options: Further keywords of ``from_pretrained``.

    Raises:
        UserError: The model does not exist, cannot be read, or is not a causal LM.
    """
    keywords: dict[str, Any] = {"dtype": dtype, **options}
    if attn_implementation is not None:
        keywords["attn_implementation"] = attn_implementation
    if not weights:
        with torch.device("meta"):
            shell: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                load_config(source), trust_remote_code=source.trust_remote_code, **keywords
            )
        shell.eval()  # type: ignore[no-untyped-call]
        return shell
    if source.is_gguf:
        # Otherwise the weights stay quantised, and cannot be trained, if the hub has a kernel for the device.
        keywords["quantization_config"] = GgufConfig(dequantize=True)
    model: PreTrainedModel = from_pretrained(
        AutoModelForCausalLM.from_pretrained, source, "causal language model", **keywords
    )
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped product of all experts does not support float64
    return model


def enable_checkpointing(model: Any, offload: bool = False) -> None:
    """Let a model recompute its activations in the backward pass.

    Args:
        model: A model of transformers, with or without adapters.
        offload: Whether to keep the inputs of the layers in CPU memory.
    """
    # transformers 5.24 renamed the method, and warns about the former name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False}, offload=offload)


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of trained weights.

    Mixed precision keeps float32 weights, because at the learning rates of alignment, updates of bfloat16 weights are
    lost to rounding.

    Args:
        precision: Precision of the Trainer, such as ``bf16-mixed``.

    Raises:
        UserError: The precision is not supported.
    """
    dtypes = {
        "32-true": torch.float32,
        "bf16-mixed": torch.float32,
        "16-mixed": torch.float32,
        "bf16-true": torch.bfloat16,
        "16-true": torch.float16,
        "64-true": torch.float64,
    }
    if precision not in dtypes:
        raise UserError("trainer.precision", f"{precision} is not supported; choose auto or one of {', '.join(dtypes)}")
    return dtypes[precision]


def frozen_dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of weights that are not trained.

    They have no updates that rounding could lose, so under ``bf16-mixed`` they are bfloat16, like the products with
    them. Under ``16-mixed`` they stay float32, because sums of hidden states overflow in float16.

    Args:
        precision: Precision of the Trainer, such as ``bf16-mixed``.

    Raises:
        UserError: The precision is not supported.
    """
    return torch.bfloat16 if precision == "bf16-mixed" else dtype_of(precision)
