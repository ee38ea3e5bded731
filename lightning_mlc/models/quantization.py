"""A frozen base model in 4 or 8 bits under trained adapters, through ``bitsandbytes``.

QLoRA (arXiv 2305.14314): the weights of the decoder's linear layers are stored quantised, and each is made
whole for the product in which it is needed. Embeddings, norms and ``lm_head`` are not quantised.
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
"""``nf4``: 4 bits a weight, with a scale for every 64 of them that is quantised too (section 3 of the paper).
``int8``: 8 bits, and 8 bits for the inputs of a layer as well but for outliers (LLM.int8, arXiv 2208.07339)."""


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights of a model with ``config`` are quantised."""
    return getattr(config, "quantization_config", None) is not None


def require_quantizable(source: ModelSource, config: PreTrainedConfig, precision: str) -> None:
    """Refuse, before it is loaded, a model that cannot be quantised.

    Raises:
        UserError: ``bitsandbytes`` is not installed, the model is quantised already, or ``precision`` (of the
            Trainer) is one that quantised products do not have.
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
    """Refuse, before it is loaded, a model whose weights cannot be trained.

    Raises:
        UserError: They are stored quantised.
    """
    if is_quantized(config) and not source.is_gguf:
        raise UserError(
            "model.name_or_path",
            f"{source} is stored quantised, and such weights cannot be trained; "
            "set model.lora to train adapters, or give the model in full precision",
        )


def loading_options(form: QuantizedFormat, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` that quantise a model while it is loaded, with products in ``dtype``."""
    if form == "nf4":
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        # It warns of the cast that int8 always takes, for every product.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep the 4-bit weights of ``model`` in the format that has a gradient.

    Where the CPU has bfloat16 instructions, bitsandbytes repacks them for inference in the first pass in
    evaluation mode, and products with repacked weights pass no gradient on: what is trained after a
    validation would be wrong without a word (bitsandbytes 0.50).
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
