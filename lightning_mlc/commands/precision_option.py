"""The option ``trainer.precision`` of the commands: ``auto`` becomes a precision before anything is made.

So the run's ``config.yaml`` and its checkpoints hold what was chosen. A run that goes on from a checkpoint, or measures
one, takes what the checkpoint was trained in.
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
    """Lightning's Trainer; as an option of a command, its precision may be ``auto``."""

    def __init__(self, *, precision: str | int | None = "auto", **kwargs: Any) -> None:
        """
        Args:
            precision: auto takes bf16-mixed where the device computes bfloat16 faster than float32, else 32-true, and
                says why. With --ckpt_path it takes what the checkpoint was trained in. Otherwise 32-true, bf16-mixed
                (bfloat16 arithmetic on float32 weights), 16-mixed, bf16-true, 16-true or 64-true.
        """
        super().__init__(precision=precision, **kwargs)  # type: ignore[arg-type]  # `settle` has replaced auto


def settle(config: Namespace, runs: bool = True) -> str | None:
    """Put a precision in the place of ``auto`` in ``config``, that of a subcommand.

    An explicit precision stays. If it is another one than the checkpoint's, or bfloat16 on a CPU that is slow at it,
    one line says so. A precision plugin (``trainer.plugins``, or of the strategy) wins over ``auto``.

    Args:
        config: The options of the subcommand, links applied.
        runs: Whether something is run here. If not, ``auto`` without a GPU means the GPUs of ``estimate``'s table.

    Returns:
        A line for :func:`tell`, once nothing else is found wrong; None if nothing need be said.

    Raises:
        UserError: There is no such precision.
    """
    options = config.trainer
    if options.precision != AUTO:
        dtype_of(unified(options.precision))
    if _has_precision_plugin(options):
        if options.precision == AUTO:
            options.precision = None
            return "precision: that of the precision plugin, which was given explicitly"
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


def tell(line: str | None) -> None:
    """Print ``line``, if there is one, on the first process."""
    if line is not None and is_first():
        print(line)


def _accelerator(option: Any) -> str:
    """The name of an accelerator, which may also be given as a class."""
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
    """The precision that a checkpoint was trained in; None if there is none, or it does not say."""
    if ckpt_path is None or not Path(ckpt_path).exists():
        return None
    try:
        recipe = Provenance.read(open_checkpoint(Path(ckpt_path))).recipe or {}
    except UserError:  # the run is about to read it too, and ends with that error
        return None
    found = recipe.get("precision")
    return None if found is None else str(found)


def _hidden_size(model: Namespace) -> int:
    source = ModelSource(model.name_or_path, model.gguf_file, model.revision, model.trust_remote_code)
    try:
        return int(getattr(load_config(source).get_text_config(), "hidden_size", USUAL_WIDTH))
    except UserError:  # the run says so itself, in its turn: what is wrong with the data comes first
        return USUAL_WIDTH
