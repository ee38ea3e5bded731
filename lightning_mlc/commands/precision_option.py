"""The option ``trainer.precision`` of the commands: ``auto`` is replaced by a precision before anything is built.

So the run's ``config.yaml`` and its checkpoints hold the precision that was chosen. A run that resumes from a
checkpoint, or measures one, takes the precision that the checkpoint was trained in.
"""

from __future__ import annotations

import logging
import pkgutil
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision

from lightning_mlc.checkpoints.format import open_checkpoint
from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import dtype_of
from lightning_mlc.models.precision import (
    AUTO,
    HALF,
    USUAL_WIDTH,
    Choice,
    Device,
    Trial,
    decide,
    has_several_processes,
    slow_bfloat16,
    try_both,
    unified,
)
from lightning_mlc.processes import is_first
from lightning_mlc.sources import ModelSource, load_config

logger = logging.getLogger(__name__)


class PrecisionTrainer(Trainer):
    """Lightning's ``Trainer``, whose precision may also be ``auto`` when it is an option of a command."""

    def __init__(self, *, precision: str | int | None = "auto", **kwargs: Any) -> None:
        """
        Args:
            precision: auto chooses bf16-mixed if the device computes bfloat16 faster than float32, otherwise 32-true,
                and prints why. With --ckpt_path it chooses the precision that the checkpoint was trained in. Or give
                32-true, bf16-mixed (bfloat16 arithmetic on float32 weights), 16-mixed, bf16-true, 16-true or 64-true.
        """
        super().__init__(precision=precision, **kwargs)  # type: ignore[arg-type]  # `settle` has replaced auto


def settle(config: Namespace, runs: bool = True) -> str | None:
    """Replace ``auto`` by a precision in ``config``, in place.

    An explicit precision stays. If it differs from the checkpoint's, or is bfloat16 on a CPU that is slow at it, one
    line reports that. A precision plugin (in ``trainer.plugins`` or of the strategy) takes precedence over ``auto``.

    Args:
        config: The options of the subcommand, with links applied.
        runs: Whether this machine will run the model. If not, ``auto`` without a GPU means the GPUs in the table of
            ``estimate``.

    Returns:
        A line for :func:`print_on_first`, to be printed when nothing else is found wrong. None: nothing to print.

    Raises:
        UserError: The precision does not exist.
    """
    options = config.trainer
    if options.precision != AUTO:
        dtype_of(unified(options.precision))
    if _has_precision_plugin(options):
        if options.precision == AUTO:
            options.precision = None
            return "precision: that of the precision plugin in the configuration"
        return None
    before = _precision_of(config.ckpt_path)
    device = Device.of(_accelerator(options.accelerator), options.devices)

    def trial() -> Trial:
        return try_both(_hidden_size(config.model), device)

    if options.precision == AUTO:
        if before is not None:
            choice = Choice(before, "the checkpoint was trained in it")
        elif not runs and options.accelerator == AUTO and device.kind in ("cpu", "mps"):
            choice = Choice(HALF, "most GPUs have bfloat16 units, and this machine has no GPU to look at")
        else:
            several = has_several_processes(options.devices, options.num_nodes)
            choice = decide(device, None if several else trial)
        options.precision = choice.precision
        return f"precision: {choice.precision}, because {choice.reason}"
    if before is not None and unified(options.precision) != before:
        return f"precision: {options.precision}, as the configuration says; the checkpoint was trained in {before}"
    if runs and is_first() and (warning := slow_bfloat16(options.precision, device, trial)) is not None:
        logger.warning("trainer.precision: %s", warning)
    return None


def print_on_first(line: str | None) -> None:
    """Print ``line`` on the first process, if it is not None."""
    if line is not None and is_first():
        print(line)


def _accelerator(option: Any) -> str:
    """The name of an accelerator. The option may also name a class."""
    if isinstance(option, str):
        return option
    return str(option.class_path).rpartition(".")[2].removesuffix("Accelerator").lower()


def _has_precision_plugin(options: Namespace) -> bool:
    given = list(options.plugins) if isinstance(options.plugins, list) else [options.plugins]
    if isinstance(options.strategy, Namespace) and options.strategy.get("init_args") is not None:
        given.append(options.strategy.init_args.get("precision_plugin"))
    kinds = [pkgutil.resolve_name(part.class_path) for part in given if isinstance(part, Namespace)]
    return any(isinstance(kind, type) and issubclass(kind, Precision) for kind in kinds)


def _precision_of(ckpt_path: Any) -> str | None:
    """The precision that a checkpoint was trained in. None if there is no checkpoint, or it has no such entry."""
    if ckpt_path is None or not Path(ckpt_path).exists():
        return None
    try:
        recipe = Provenance.read(open_checkpoint(Path(ckpt_path))).recipe or {}
    except UserError:  # the run reads the checkpoint later, and ends with this error
        return None
    found = recipe.get("precision")
    return None if found is None else str(found)


def _hidden_size(model: Namespace) -> int:
    source = ModelSource(model.name_or_path, model.gguf_file, model.revision, model.trust_remote_code)
    try:
        return int(getattr(load_config(source).get_text_config(), "hidden_size", USUAL_WIDTH))
    except UserError:  # the run reports it later, after errors in the data
        return USUAL_WIDTH
