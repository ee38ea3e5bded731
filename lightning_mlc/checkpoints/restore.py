"""Restore the model of a checkpoint, with its adapters merged or kept apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.merging import require_merged, shared_weight, trial_logits
from lightning_mlc.models.quantization import is_quantized
from lightning_mlc.models.tensors import precision_kept
from lightning_mlc.sources import ModelSource, load_config

_PREFIX = "policy.model."


def restore(checkpoint: dict[str, Any], merge: bool = True, trust_remote_code: bool = False) -> Any:
    """The model in ``checkpoint``, on the CPU.

    Args:
        checkpoint: As :func:`~lightning_mlc.checkpoints.format.read_checkpoint` returns it.
        merge: Merge LoRA adapters into the weights. False: keep them apart; the model must have some.
        trust_remote_code: Run Python code of the model's repository. A checkpoint alone cannot allow this.

    Raises:
        UserError: The checkpoint was not written by lightning-mlc, or its base model no longer exists.
    """
    provenance = Provenance.read(checkpoint)
    weights = {
        key.removeprefix(_PREFIX): value for key, value in checkpoint["state_dict"].items() if key.startswith(_PREFIX)
    }
    source = provenance.model_source(trust_remote_code)
    if not any(value.is_floating_point() for value in weights.values()):
        raise UserError("ckpt_path", "the checkpoint has no weights of a model")
    if provenance.lora is not None:
        model = _with_adapters(provenance, source, weights, merge)
    elif not merge:
        raise UserError(
            "--adapters",
            "the checkpoint has no adapters, because it was trained without model.lora; leave the option out",
        )
    else:
        model = _rebuild(provenance, source, weights)
    if provenance.generation_config is not None:
        model.generation_config = GenerationConfig.from_dict(provenance.generation_config)
    return model


def _with_adapters(provenance: Provenance, source: ModelSource, weights: dict[str, torch.Tensor], merge: bool) -> Any:
    assert provenance.lora is not None
    lora = LoRA(**provenance.lora)
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    if lora.quantize is None:
        base = lora.load_base(source, dtype, torch.device("cpu"))
    else:
        # In the dtype of the training, because the weights were quantised from that dtype.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = lora.load_base(source, getattr(torch, provenance.config["dtype"]), device)
    if merge and is_quantized(base.config):
        quantized: Any = base
        try:
            base = quantized.dequantize(dtype)
            with precision_kept(base):
                base.to(dtype=dtype, device="cpu")
        except NotImplementedError as error:
            raise UserError(
                "--ckpt_path",
                f"adapters cannot be merged into {source}, because it is quantised; "
                "export them on their own with --adapters",
            ) from error
    adapted: Any = add_lora(base, lora, source.revision)
    missing = adapted.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise UserError("--ckpt_path", f"the checkpoint does not fit {source}: {missing.unexpected_keys[0]}")
    if not merge:
        return adapted
    trained, shared = trial_logits(adapted), shared_weight(adapted)
    merged = adapted.merge_and_unload()
    require_merged(merged, trained, shared)
    return merged


def _rebuild(provenance: Provenance, source: ModelSource, weights: dict[str, torch.Tensor]) -> Any:
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    settings = dict(provenance.config)
    auto: Any = AutoModelForCausalLM  # transformers leaves this method untyped
    kind = settings.pop("model_type")
    try:
        if kind in CONFIG_MAPPING or not source.trust_remote_code:
            config = AutoConfig.for_model(kind, **settings)
        else:  # the model has its own code, which is at the source
            own = load_config(source)
            config = type(own).from_dict(settings)
            config.name_or_path = own.name_or_path
        model = auto.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)
        model.load_state_dict(weights, strict=True)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            "ckpt_path", f"the checkpoint does not fit the model that it names ({first_line(error)})"
        ) from error
    return model.eval()
