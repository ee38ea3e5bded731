"""Load a causal LM, and in which dtype."""

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
    """The model of ``source`` in ``dtype``, in eval mode and on the CPU, unless ``options`` say otherwise.

    ``options`` are keywords of ``from_pretrained``, beside those of ``source``.

    Without ``weights`` it is on the ``meta`` device, which holds shapes alone: nothing but its configuration is read.

    Raises:
        UserError: There is none, it cannot be read, or it is not a causal LM.
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
        # Else the weights stay packed, and cannot be trained, wherever the hub has a kernel for the device.
        keywords["quantization_config"] = GgufConfig(dequantize=True)
    model: PreTrainedModel = from_pretrained(
        AutoModelForCausalLM.from_pretrained, source, "causal language model", **keywords
    )
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the product for all experts at once has no float64
    return model


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of the weights under a Trainer ``precision``.

    Mixed precision keeps float32 weights: at alignment learning rates, updates of bfloat16 weights
    round away.

    Raises:
        UserError: The precision is one this project does not run.
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
    """The dtype of weights that are not trained under a Trainer ``precision``.

    No update is added to them that could round away, so under ``bf16-mixed`` they are bfloat16, as the
    products with them are. (Not so under ``16-mixed``: sums of hidden states overflow in float16.)

    Raises:
        UserError: The precision is one this project does not run.
    """
    return torch.bfloat16 if precision == "bf16-mixed" else dtype_of(precision)
