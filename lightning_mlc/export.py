"""From a training checkpoint to a Hugging Face folder that any library loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_mlc.checkpoint_format import read_checkpoint
from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import ModelSource, load_causal_lm, load_tokenizer
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.provenance import Provenance

_PREFIX = "policy.model."


def export(ckpt_path: str | Path, out: str | Path, tokenizer: str | None = None) -> Path:
    """Write the model of a checkpoint to ``out``: safetensors, tokenizer, generation config.

    The extractor stays behind. Weights keep the dtype they were trained in; LoRA adapters are merged.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote: a file, or a folder of FSDP2.
        out: The folder to write; it must not exist or be empty.
        tokenizer: Where the tokenizer is; by default where the model was trained from.

    Returns:
        ``out``.

    Raises:
        UserError: The checkpoint cannot be read, is not ours, or ``out`` is not empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} exists and is not an empty folder; give another one")
    checkpoint = read_checkpoint(Path(ckpt_path), wanted={"state_dict", Provenance.KEY})
    provenance = Provenance.read(checkpoint)
    weights = {
        key.removeprefix(_PREFIX): value for key, value in checkpoint["state_dict"].items() if key.startswith(_PREFIX)
    }
    source = ModelSource(**provenance.source)
    model = _rebuild(provenance, source, weights)
    if provenance.generation_config is not None:
        model.generation_config = GenerationConfig.from_dict(provenance.generation_config)
    text = load_tokenizer(source if tokenizer is None else ModelSource(tokenizer))

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and then renamed, so that a folder that exists is complete.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished, safe_serialization=True)
        text.save_pretrained(unfinished)
        unfinished.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def _rebuild(provenance: Provenance, source: ModelSource, weights: dict[str, torch.Tensor]) -> Any:
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    if provenance.lora is not None:
        adapted: Any = add_lora(load_causal_lm(source, dtype), LoRA(**provenance.lora))
        missing = adapted.load_state_dict(weights, strict=False)
        if missing.unexpected_keys:
            raise UserError(f"--ckpt_path: the checkpoint does not fit {source}: {missing.unexpected_keys[0]}")
        return adapted.merge_and_unload()
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
