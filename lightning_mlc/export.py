"""From a training checkpoint to a Hugging Face folder that any library loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_mlc.checkpoint_format import read_checkpoint
from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import ModelSource, load_tokenizer
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.quantization import is_quantized
from lightning_mlc.provenance import Provenance

_PREFIX = "policy.model."


def export(ckpt_path: str | Path, out: str | Path, tokenizer: str | None = None, adapters: bool = False) -> Path:
    """Write the model of a checkpoint to ``out``: safetensors, tokenizer, generation config.

    The extractor stays behind. Weights keep the dtype they were trained in. LoRA adapters are merged; into
    a quantised model after its weights have been made whole, for there the adapters were trained: the
    weights as they were before it was quantised would be another model than the one that was validated.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote: a file, or a folder of FSDP2.
        out: The folder to write; it must not exist or be empty.
        tokenizer: Where the tokenizer is; by default where the model was trained from.
        adapters: Write the LoRA adapters alone, as a ``peft`` folder.

    Returns:
        ``out``.

    Raises:
        UserError: The checkpoint cannot be read, is not ours, has no adapters or none that can be merged, or
            ``out`` is not empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} exists and is not an empty folder; give another one")
    checkpoint = read_checkpoint(Path(ckpt_path), wanted={"state_dict", Provenance.KEY})
    provenance = Provenance.read(checkpoint)
    model = restore(checkpoint, merge=not adapters)
    text = load_tokenizer(ModelSource(**provenance.source) if tokenizer is None else ModelSource(tokenizer))

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and then renamed, so that a folder that exists is complete.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished, safe_serialization=True)
        text.save_pretrained(unfinished)
        (unfinished / Provenance.FILE).write_text(json.dumps(provenance.as_dict(), indent=2) + "\n", encoding="utf-8")
        unfinished.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def restore(checkpoint: dict[str, Any], merge: bool = True) -> Any:
    """The model inside a ``checkpoint`` that :func:`read_checkpoint` read, on the CPU.

    LoRA adapters are merged, or without ``merge`` kept beside the model, which must then have some.

    Raises:
        UserError: The checkpoint is not ours, or what it was trained from is gone.
    """
    provenance = Provenance.read(checkpoint)
    weights = {
        key.removeprefix(_PREFIX): value for key, value in checkpoint["state_dict"].items() if key.startswith(_PREFIX)
    }
    source = ModelSource(**provenance.source)
    if provenance.lora is not None:
        model = _with_adapters(provenance, source, weights, merge)
    elif not merge:
        raise UserError("--adapters: the checkpoint has none, for it was trained without model.lora; leave it out")
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
        # In the dtype it was trained in, for that is what was rounded to a few bits.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = lora.load_base(source, getattr(torch, provenance.config["dtype"]), device)
    if merge and is_quantized(base.config):
        quantized: Any = base
        try:
            base = quantized.dequantize(dtype).to(dtype=dtype, device="cpu")
        except NotImplementedError as error:
            raise UserError(
                f"--ckpt_path: adapters cannot be merged into {source} as it is quantised; "
                "write them alone with --adapters"
            ) from error
    adapted: Any = add_lora(base, lora)
    missing = adapted.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise UserError(f"--ckpt_path: the checkpoint does not fit {source}: {missing.unexpected_keys[0]}")
    return adapted.merge_and_unload() if merge else adapted


def _rebuild(provenance: Provenance, source: ModelSource, weights: dict[str, torch.Tensor]) -> Any:
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    settings = dict(provenance.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    auto: Any = AutoModelForCausalLM  # transformers leaves this method untyped
    model = auto.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)
    model.load_state_dict(weights, strict=True)
    return model


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
