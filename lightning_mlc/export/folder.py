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
    (:mod:`lightning_mlc.export.proof`), and merged adapters with those that were trained.

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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
