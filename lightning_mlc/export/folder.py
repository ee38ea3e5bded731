"""From a training checkpoint to a Hugging Face folder that any library can load."""

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
from transformers import PreTrainedTokenizerBase

from lightning_mlc.checkpoints.finding import find_checkpoint
from lightning_mlc.checkpoints.format import bytes_of, read_checkpoint
from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.checkpoints.restore import restore
from lightning_mlc.data.turns import end_tokens
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.export.generation_config import make_writable
from lightning_mlc.export.hub import push, require_pushable
from lightning_mlc.export.model_card import loading_call, model_card
from lightning_mlc.export.proof import prove, prove_adapters
from lightning_mlc.models.lora import LoRA
from lightning_mlc.progress.bars import say, size
from lightning_mlc.report.measured import CALLBACKS, measured_in
from lightning_mlc.sources import ModelSource, load_tokenizer


class Exported(NamedTuple):
    """The result of an export."""

    folder: Path
    """The folder that was written."""
    address: str | None
    """Address of the repository that the folder was pushed to. None: it was not pushed."""
    call: str
    """The Python expression that loads the model."""


def export(
    ckpt_path: str | Path,
    out: str | Path,
    tokenizer: str | None = None,
    adapters: bool = False,
    max_shard_size: str | None = None,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the model of a checkpoint to a folder: safetensors, tokenizer, generation configuration, model card.

    The extractor is left out. Weights keep the dtype that they were trained in. LoRA adapters are merged into the
    weights. If the model was quantised, they are merged into the dequantised weights, because those are the weights
    that the adapters were trained on; the original weights would give a model that was never validated.

    Before the folder gets its name, it is loaded again and compared with the trained model
    (:mod:`lightning_mlc.export.proof`). A model with merged adapters is also compared with the one before merging.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote (a file, or a folder of FSDP2), or the folder of a run.
        out: The folder to write. It must not exist, or be empty.
        tokenizer: Folder or hub id of the tokenizer. None: that of the model the training started from.
        adapters: Whether to write the LoRA adapters alone, as a ``peft`` folder.
        max_shard_size: Largest size of a file of weights, such as ``5GB``. None: the default of transformers.
        push_to_hub: Repository to upload the folder to, as ``OWNER/NAME``. None: do not upload.
        trust_remote_code: Whether to run Python code from the model's repository. A checkpoint alone cannot turn
            this on.

    Raises:
        UserError: The checkpoint cannot be read, was not written by ``fit``, or has no adapters or none that can be
            merged; the folder differs from the trained model; or ``out`` is not empty or cannot be written.
    """
    folder = Path(out)
    _check_options(folder, adapters, max_shard_size, push_to_hub)
    path = find_checkpoint(Path(ckpt_path))
    say(f"reading {path}: {size(bytes_of(path))}")
    checkpoint = read_checkpoint(path, wanted={"state_dict", Provenance.KEY, CALLBACKS})
    provenance = Provenance.read(checkpoint)
    source = provenance.model_source(trust_remote_code)
    if push_to_hub is not None and adapters and source.hub_id is None:
        raise UserError(
            "--push_to_hub",
            f"adapters need their base model, but {source.short_name} is not on the hub; export without --adapters",
        )
    text = load_tokenizer(source if tokenizer is None else ModelSource(tokenizer, trust_remote_code=trust_remote_code))
    model = restore(checkpoint, merge=not adapters, trust_remote_code=trust_remote_code)
    # Generation must stop at the tokens that responses were trained to end with.
    ends = end_tokens(model, text)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    make_writable(model.generation_config)
    card = model_card(provenance, measured_in(checkpoint), push_to_hub or folder.resolve().name, adapters)

    say(f"writing {folder}")
    with _complete_or_absent(folder) as unfinished:
        _write(unfinished, model, text, provenance, card, adapters, max_shard_size)
        say("comparing what was written with the model that was trained")
        _prove(unfinished, model, provenance, adapters, trust_remote_code)
    address = None if push_to_hub is None else push(folder, push_to_hub)
    return Exported(folder, address, loading_call(str(folder), source, adapters))


def _write(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    provenance: Provenance,
    card: str,
    adapters: bool,
    max_shard_size: str | None,
) -> None:
    """Write all files of an export to ``folder``."""
    options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if adapters:
        # Embeddings are never trained with adapters. Without this option peft would ask the hub whether they were.
        options["save_embedding_layers"] = False
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    record = json.dumps(provenance.without_paths().as_dict(), indent=2)
    (folder / Provenance.FILE).write_text(record + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _prove(folder: Path, model: Any, provenance: Provenance, adapters: bool, trust_remote_code: bool) -> None:
    """Compare the files in ``folder`` with the trained ``model``.

    Raises:
        UserError: They differ.
    """
    if not adapters:
        prove(model, folder, trust_remote_code)
    elif provenance.lora is not None:
        lora = LoRA(**provenance.lora)
        dtype = model.dtype if lora.quantize is None else getattr(torch, provenance.config["dtype"])
        prove_adapters(model, folder, lora, provenance.model_source(trust_remote_code), dtype)


@contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path]:
    """Give a new folder next to ``folder``, and rename it to ``folder`` at the end, when it is complete.

    Raises:
        UserError: It cannot be written.
    """
    unfinished: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield unfinished
        # tempfile and safetensors give access to the owner only. Use the user's usual permissions.
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


def _check_options(folder: Path, adapters: bool, max_shard_size: str | None, push_to_hub: str | None) -> None:
    """Refuse, before the checkpoint is read, options that cannot work."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("--out", f"{folder} exists and is not an empty folder; give another one")
    if max_shard_size is not None:
        _check_shard_size(max_shard_size, adapters)
    if push_to_hub is not None:
        require_pushable(push_to_hub)


def _check_shard_size(size: str, adapters: bool) -> None:
    if adapters:
        raise UserError("--max_shard_size", "adapters are one file; remove it, or export without --adapters")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", size):
        raise UserError("--max_shard_size", f"cannot read '{size}'; write a number of KB, MB or GB, such as 5GB")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
