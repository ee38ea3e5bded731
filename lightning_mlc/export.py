"""From a training checkpoint to a Hugging Face folder that any library loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_mlc.checkpoint_format import bytes_of, read_checkpoint
from lightning_mlc.checkpoints import find_checkpoint
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.hub import push, require_pushable
from lightning_mlc.model_card import loading_call, model_card
from lightning_mlc.models.loading import ModelSource, load_config, load_tokenizer
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.quantization import is_quantized
from lightning_mlc.models.tensors import precision_kept
from lightning_mlc.models.turns import end_tokens
from lightning_mlc.progress import say, size
from lightning_mlc.proof import make_writable, prove, prove_adapters, require_merged, shared_weight, trial_logits
from lightning_mlc.provenance import Provenance
from lightning_mlc.report.measured import CALLBACKS, measured_in

_PREFIX = "policy.model."


class Exported(NamedTuple):
    """What an export wrote."""

    folder: Path
    address: str | None
    """Of the repository it was pushed to."""
    call: str
    """The Python expression that loads it."""


def export(
    ckpt_path: str | Path,
    out: str | Path,
    tokenizer: str | None = None,
    adapters: bool = False,
    max_shard_size: str | None = None,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the model of a checkpoint to ``out``: safetensors, tokenizer, generation config, model card.

    The extractor stays behind. Weights keep the dtype they were trained in. LoRA adapters are merged; into
    a quantised model after its weights have been made whole, for there the adapters were trained: the
    weights as they were before it was quantised would be another model than the one that was validated.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote: a file, or a folder of FSDP2; or the folder of a run.
        out: The folder to write; it must not exist or be empty.
        tokenizer: Where the tokenizer is; by default where the model was trained from.
        adapters: Write the LoRA adapters alone, as a ``peft`` folder.
        max_shard_size: Largest file of weights, as ``5GB``; None leaves it to transformers.
        push_to_hub: Repository to upload the folder to.
        trust_remote_code: Run Python code that the model's repository carries. A checkpoint alone cannot ask for it.

    Before the folder takes its name, it is loaded again and compared with the model in memory
    (:mod:`lightning_mlc.proof`), and merged adapters with those that were trained.

    Raises:
        UserError: The checkpoint cannot be read, is not ours, has no adapters or none that can be merged, what was
            written is not the model that was trained, or ``out`` is not empty or cannot be written.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("--out", f"{folder} exists and is not an empty folder; give another one")
    if max_shard_size is not None:
        _check_shard_size(max_shard_size, adapters)
    if push_to_hub is not None:
        require_pushable(push_to_hub)
    path = find_checkpoint(Path(ckpt_path))
    say(f"reading {path}: {size(bytes_of(path))}")
    checkpoint = read_checkpoint(path, wanted={"state_dict", Provenance.KEY, CALLBACKS})
    provenance = Provenance.read(checkpoint)
    source = provenance.model_source(trust_remote_code)
    if push_to_hub is not None and adapters and source.hub_id is None:
        raise UserError(
            "--push_to_hub",
            f"adapters belong to their base model, and {source.short_name} is not on the hub; "
            "export without --adapters",
        )
    text = load_tokenizer(source if tokenizer is None else ModelSource(tokenizer, trust_remote_code=trust_remote_code))
    model = restore(checkpoint, merge=not adapters, trust_remote_code=trust_remote_code)
    # What its responses were trained to end with is what generation has to end at.
    ends = end_tokens(model, text)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    make_writable(model.generation_config)
    card = model_card(provenance, measured_in(checkpoint), push_to_hub or folder.resolve().name, adapters)

    say(f"writing {folder}")
    with _as_a_whole(folder) as unfinished:
        options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        if adapters:
            # Adapters alone are trained. To find out by itself, peft asks the hub for the base's configuration.
            options["save_embedding_layers"] = False
        model.save_pretrained(unfinished, **options)
        text.save_pretrained(unfinished)
        record = json.dumps(provenance.without_paths().as_dict(), indent=2)
        (unfinished / Provenance.FILE).write_text(record + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        say("comparing what was written with the model that was trained")
        if not adapters:
            prove(model, unfinished, trust_remote_code)
        elif provenance.lora is not None:
            lora = LoRA(**provenance.lora)
            dtype = model.dtype if lora.quantize is None else getattr(torch, provenance.config["dtype"])
            prove_adapters(model, unfinished, lora, source, dtype)
    address = None if push_to_hub is None else push(folder, push_to_hub)
    return Exported(folder, address, loading_call(str(folder), source, adapters))


@contextmanager
def _as_a_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, which takes its place in the end, so that a folder that exists is complete.

    Raises:
        UserError: It cannot be written.
    """
    unfinished: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield unfinished
        # A folder of tempfile and a file of safetensors are for their owner alone.
        for path in (unfinished, *unfinished.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError("--out", f"cannot write {folder} ({first_line(error)}); nothing is left of it") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _check_shard_size(size: str, adapters: bool) -> None:
    if adapters:
        raise UserError("--max_shard_size", "adapters are one file; leave it out, or export without --adapters")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", size):
        raise UserError("--max_shard_size", f"cannot read '{size}'; write a number of KB, MB or GB, as 5GB")


def restore(checkpoint: dict[str, Any], merge: bool = True, trust_remote_code: bool = False) -> Any:
    """The model inside a ``checkpoint`` that :func:`read_checkpoint` read, on the CPU.

    LoRA adapters are merged, or without ``merge`` kept beside the model, which must then have some. Code that the
    model's repository carries is run with ``trust_remote_code`` alone, whatever the checkpoint says.

    Raises:
        UserError: The checkpoint is not ours, or what it was trained from is gone.
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
        raise UserError("--adapters", "the checkpoint has none, for it was trained without model.lora; leave it out")
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
            base = quantized.dequantize(dtype)
            with precision_kept(base):
                base.to(dtype=dtype, device="cpu")
        except NotImplementedError as error:
            raise UserError(
                "--ckpt_path",
                f"adapters cannot be merged into {source} as it is quantised; write them alone with --adapters",
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
        else:  # with code of its own, which is where the model was trained from
            own = load_config(source)
            config = type(own).from_dict(settings)
            config.name_or_path = own.name_or_path
        model = auto.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)
        model.load_state_dict(weights, strict=True)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            "ckpt_path", f"the checkpoint does not fit the model it says it is of ({first_line(error)})"
        ) from error
    return model.eval()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
