"""The MLC loss in LLaMA-Factory, which has no hook for it: its trainers are replaced where it makes them.

::

    python -m lightning_mlc.plugins.llamafactory train config.yaml

``config.yaml`` is a configuration of LLaMA-Factory with a block more::

    mlc:
      prompts: prompts.jsonl
      weight: 0.8

Written for LLaMA-Factory 0.9.5 (``llamafactory/train/tuner.py``, ``llamafactory/train/*/workflow.py``,
https://github.com/hiyouga/LLaMA-Factory). Several GPUs: it starts ``torchrun`` by the same environment variables as
``llamafactory-cli``, or you start it with ``torchrun -m``.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_mlc.errors import UserError
from lightning_mlc.plugins.options import add_from_block, check_prompts, checked

TRAINERS = {
    "pt": "CustomTrainer",
    "sft": "CustomSeq2SeqTrainer",
    "dpo": "CustomDPOTrainer",
    "kto": "CustomKTOTrainer",
}
"""Stages of LLaMA-Factory that can have the loss, and the trainer of each. Stage ``dpo`` includes ORPO and SimPO."""
_OTHER_BACKENDS = ("use_ray", "use_mca", "use_hyper_parallel", "use_megatron_bridge", "use_v1")
"""Keys of the configuration, or in capitals environment variables, that make LLaMA-Factory take other trainers."""
_MODULE = "lightning_mlc.plugins.llamafactory"
_USAGE = f"usage: python -m {_MODULE} train CONFIG.yaml [KEY=VALUE ...] [mlc.OPTION=VALUE ...]"


def install(prompts: str | Path, **options: Any) -> Callable[[], None]:
    """Make the trainers of LLaMA-Factory add the MLC loss, in this process and until it is undone::

        install("prompts.jsonl", weight=0.8)
        run_exp({"stage": "dpo", ...})

    It is for programs that call LLaMA-Factory themselves. It does not reach the workers of Ray.

    Args:
        prompts: A file of prompts in several languages.
        **options: Options of :class:`~lightning_mlc.plugins.regularizer.MLCRegularizer`.

    Returns:
        A function that undoes it.

    Raises:
        UserError: LLaMA-Factory is not installed or has no such trainers, or an option is wrong.
    """
    block = {"prompts": str(prompts), **options}
    checked(block)
    replaced: list[tuple[Any, str, type]] = []
    for stage, name in TRAINERS.items():
        original = getattr(_module(f"train.{stage}.trainer"), name, None)
        if original is None:
            raise UserError("llamafactory", f"{stage}/trainer.py has no {name}; MLC needs LLaMA-Factory 0.9")
        if hasattr(original, "mlc_block"):
            raise UserError("install", "LLaMA-Factory's trainers have the MLC loss already; undo it first")
        wrapped = _with_mlc(original, block)
        # Some workflows import the class when they are imported, others when they run.
        for module in (_module(f"train.{stage}.trainer"), _module(f"train.{stage}.workflow")):
            if hasattr(module, name):
                replaced.append((module, name, original))
                setattr(module, name, wrapped)

    def undo() -> None:
        for module, name, original in replaced:
            setattr(module, name, original)

    return undo


def _with_mlc(kind: Any, block: Mapping[str, Any]) -> type:
    """Return a subclass of a trainer that adds the loss to itself if it is going to train."""

    @functools.wraps(kind.__init__)
    def __init__(self: Any, *args: Any, **keywords: Any) -> None:
        kind.__init__(self, *args, **keywords)
        if self.args.do_train:
            add_from_block(self, block)

    members = {"__init__": __init__, "__module__": kind.__module__, "__doc__": kind.__doc__, "mlc_block": block}
    return type(kind.__name__, (kind,), members)


def train(config: Mapping[str, Any]) -> None:
    """Run a training of LLaMA-Factory with the MLC loss.

    Args:
        config: LLaMA-Factory's configuration with an ``mlc`` block: ``prompts``, and options of
            :class:`~lightning_mlc.plugins.regularizer.MLCRegularizer`.

    Raises:
        UserError: The block is missing or wrong, or LLaMA-Factory would train with something else than its own
            trainers of stage ``pt``, ``sft``, ``dpo`` or ``kto``.
    """
    _run(*_divided(config))


def _run(options: dict[str, Any], block: Mapping[str, Any]) -> None:
    undo = install(**block)
    try:
        _module("train.tuner").run_exp(options)
    finally:
        undo()


def _divided(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return LLaMA-Factory's options and those of the loss. Refuse what would train without the loss."""
    options = dict(config)
    block = options.pop("mlc", None)
    if block is None:
        raise UserError("mlc", "is missing; add a block such as {prompts: prompts.jsonl}, or use llamafactory-cli")
    stage = options.get("stage", "sft")
    if stage not in TRAINERS:
        raise UserError("stage", f"{stage} cannot have the MLC loss; stages with it are {', '.join(TRAINERS)}")
    for key in _OTHER_BACKENDS:
        if _is_on(options.get(key)) or _is_on(os.environ.get(key.upper())):
            raise UserError(key, "takes trainers that cannot have the MLC loss; switch it off")
    block = checked(block)
    if _is_on(options.get("do_train")):
        check_prompts(block)
    return options, block


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("1", "y", "true")


def _module(name: str) -> Any:
    try:
        return import_module(f"llamafactory.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "llamafactory":
            raise
        raise UserError("llamafactory", "LLaMA-Factory 0.9 is not installed: pip install llamafactory") from error


# ---- the command ------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words of the command line. None: those of this process.

    Returns:
        The exit status: 0, 2 if something that the user gave is wrong, or that of the processes it started.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"], []):
        print(_USAGE)
        return 0
    try:
        if words[0] != "train" or len(words) < 2 or words[1].startswith("-"):
            raise UserError(None, _USAGE)
        options, block = _divided(_read(words[1:]))  # here, so that a fault is told once, and not by each process
        if (command := _command_of_torchrun(words)) is not None:
            return subprocess.run(command, check=False).returncode
        _run(options, block)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read(words: Sequence[str]) -> dict[str, Any]:
    """Read a configuration and ``KEY=VALUE`` as LLaMA-Factory does."""
    if not Path(words[0]).is_file():
        raise UserError(words[0], "there is no such file; give a YAML or JSON file of LLaMA-Factory")
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        found = _module("hparams.parser").read_args()
    finally:
        sys.argv = before
    if not isinstance(found, dict):
        raise UserError(words[0], "must be a YAML or JSON file")
    return found


def _command_of_torchrun(words: Sequence[str]) -> list[str] | None:
    """Return the command that starts one process for each device; None if this is one of them, or the only one."""
    if "LOCAL_RANK" in os.environ:
        return None
    devices = int(_module("extras.misc").get_device_count())
    if devices < 2 and not _is_on(os.environ.get("FORCE_TORCHRUN")):
        return None
    if "RDZV_ID" in os.environ:
        raise UserError("RDZV_ID", f"elastic training needs: torchrun ... -m {_MODULE} {' '.join(words)}")
    variables = {
        "nnodes": os.environ.get("NNODES", "1"),
        "node_rank": os.environ.get("NODE_RANK", "0"),
        "nproc_per_node": os.environ.get("NPROC_PER_NODE", str(max(1, devices))),
        "master_addr": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "master_port": os.environ.get("MASTER_PORT") or str(_module("extras.misc").find_available_port()),
    }
    flags = [f"--{name}={value}" for name, value in variables.items()]
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", _MODULE, *words]


if __name__ == "__main__":
    sys.exit(main())
