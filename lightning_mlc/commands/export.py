"""``lightning-mlc export``: its options and what it says in the end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_mlc.files.paths import expand_all


def run(args: Sequence[str]) -> None:
    """Export as ``args`` say.

    Raises:
        UserError: Something the user gave is wrong.
    """
    parser = argparse.ArgumentParser(prog="lightning-mlc export", description="turn a checkpoint into a model folder")
    parser.add_argument(
        "--ckpt_path",
        required=True,
        help="checkpoint that `lightning-mlc fit` wrote, or the folder of a run, finished or not, for its newest one",
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--tokenizer",
        help="folder or hub id of the tokenizer, if it is no longer where the model was trained from",
    )
    parser.add_argument(
        "--adapters", action="store_true", help="write the LoRA adapters alone, for peft, instead of merging them"
    )
    parser.add_argument(
        "--max_shard_size", help="largest file of weights, as 5GB; a larger model is written as several"
    )
    parser.add_argument(
        "--push_to_hub", metavar="REPO_ID", help="upload the folder, to a private repository where there is none"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that the model's repository carries; read it first",
    )
    options = parser.parse_args(args)

    expand_all(options)
    from lightning_mlc.export.folder import export

    exported = export(**vars(options))
    print(f"wrote {exported.folder}: load it with {exported.call}")
    if exported.address is not None:
        print(f"pushed to {exported.address}")
