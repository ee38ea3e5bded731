"""A frozen base model in 4 or 8 bits with trained adapters, through ``bitsandbytes``.

QLoRA (arXiv 2305.14314) stores the weights of the decoder's linear layers quantised, and dequantises each one for its
product. Embeddings, norms and ``lm_head`` are not quantised.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from lightning_mlc.errors import UserError
from lightning_mlc.sources import ModelSource

QuantizedFormat = Literal["nf4", "int8"]
"""``nf4``: 4 bits per weight, and a scale for every 64 weights that is quantised too (section 3 of the paper).
``int8``: 8 bits per weight, and 8 bits for a layer's inputs except outliers (LLM.int8, arXiv 2208.07339)."""


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights of a model with ``config`` are quantised."""
    return getattr(config, "quantization_config", None) is not None


def require_quantizable(source: ModelSource, config: PreTrainedConfig, precision: str) -> None:
    """Refuse a model that cannot be quantised, before it is loaded.

    Args:
        source: The model.
        config: Its configuration.
        precision: Precision of the Trainer.

    Raises:
        UserError: ``bitsandbytes`` is not installed, the model is already quantised, or quantised products do not
            support ``precision``.
    """
    key = "model.lora.quantize"
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(key, f"needs {' and '.join(missing)}; run `pip install {' '.join(missing)}`")
    if source.is_gguf:
        raise UserError(key, f"not for GGUF files; give the folder or hub id of the model, or remove {key}")
    if is_quantized(config):
        raise UserError(key, f"{source} is stored quantised; remove {key} to train adapters on it as it is")
    if precision == "64-true":
        raise UserError(key, "bitsandbytes has no float64; set trainer.precision to bf16-mixed")


def require_whole(source: ModelSource, config: PreTrainedConfig) -> None:
    """Refuse a model whose weights cannot be trained, before it is loaded.

    Args:
        source: The model.
        config: Its configuration.

    Raises:
        UserError: The weights are stored quantised.
    """
    if is_quantized(config) and not source.is_gguf:
        raise UserError(
            "model.name_or_path",
            f"{source} is stored quantised, and such weights cannot be trained; "
            "set model.lora to train adapters, or give the model in full precision",
        )


def loading_options(form: QuantizedFormat, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return keywords of ``from_pretrained`` that quantise a model while it is loaded.

    Args:
        form: Format of the weights.
        dtype: Dtype of the products.
        device: Device of the model.
    """
    if form == "nf4":
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        # It would warn for every product about a cast that int8 always needs.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the format that passes gradients on.

    On CPUs with bfloat16 instructions, bitsandbytes 0.50 converts the weights for inference in the first pass in
    evaluation mode. Products with converted weights pass no gradient on, so that training after a validation would be
    wrong without an error.

    Args:
        model: The model, quantised or not.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
