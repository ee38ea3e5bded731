"""``lightning-mlc export``: its options, and the lines that it prints."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mlc.commands.options import OneLineParser
from lightning_mlc.files.paths import expand_all


def parser() -> OneLineParser:
    """The options of ``export``."""
    found = OneLineParser(prog="lightning-mlc export", description="turn a checkpoint into a model folder")
    found.add_argument(
        "--ckpt_path",
        required=True,
        help="checkpoint of `lightning-mlc fit`, or the folder of a run, whose newest checkpoint is taken",
    )
    found.add_argument("--out", required=True, help="folder to write; must not exist or be empty")
    found.add_argument(
        "--tokenizer",
        help="folder or hub id of the tokenizer, if it is no longer with the original model",
    )
    found.add_argument(
        "--adapters", action="store_true", help="write only the LoRA adapters, for peft, instead of merging them"
    )
    found.add_argument(
        "--max_shard_size", help="largest file of weights, such as 5GB; a larger model is split into several files"
    )
    found.add_argument(
        "--push_to_hub",
        metavar="REPO_ID",
        help="upload the folder; a repository that does not exist is created as private",
    )
    found.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code from the model's repository; read it first",
    )
    return found


def run(args: Sequence[str]) -> None:
    """Export the checkpoint that ``args`` name.

    Raises:
        UserError: Something the user gave is wrong.
    """
    options = parser().parse_args(args)
    expand_all(options)
    from lightning_mlc.export.folder import export

    exported = export(**vars(options))
    print(f"wrote {exported.folder}: load it with {exported.call}")
    if exported.address is not None:
        print(f"pushed to {exported.address}")
