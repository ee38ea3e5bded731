"""The settings that a run trained with, as plain values that a checkpoint keeps and a model card shows.

They hold no text of the data and no path of the machine: only the names of files, and a fingerprint of the data.
"""

from __future__ import annotations

import dataclasses
import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_mlc.consistency import Consistency
from lightning_mlc.data.loading import short_name
from lightning_mlc.objectives import Objective
from lightning_mlc.processes import DataParallel
from lightning_mlc.reference import ReferenceSettings
from lightning_mlc.sources import ModelSource
from lightning_mlc.training.schedules import Warmup

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

PACKAGES = ("lightning-mlc", "torch", "transformers", "lightning", "peft")
_REPRESENTATION = ("layer", "extractor", "extractor_dim", "extractor_bias", "extractor_lr", "center")


def describe_run(
    trainer: Trainer,
    source: ModelSource,
    objective: Objective | None,
    consistency: Consistency,
    reference: ReferenceSettings | None,
) -> dict[str, Any]:
    """The settings that ``trainer`` has used until now to train the model of ``source``.

    ``reference`` is None if no reference is used.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    schedules = [_schedule(config.scheduler) for config in trainer.lr_scheduler_configs]
    return {
        "base_model": source.hub_id,
        "objective": None if objective is None else describe_objective(objective),
        "consistency": describe_consistency(consistency),
        "reference": None if reference is None else _reference(reference),
        "optimizer": None if optimizer is None else describe_optimizer(optimizer),
        "schedule": schedules[0] if schedules else None,
        "gradient_clip_val": trainer.gradient_clip_val,
        "steps": trainer.global_step,
        "seed": data.seed,
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "batch": {
            "batch_size": None if data.tokens_per_batch else data.batch_size,
            "tokens_per_batch": data.tokens_per_batch,
            "accumulate": trainer.accumulate_grad_batches,
            "processes": DataParallel.of(trainer).size,
        },
        "data": {
            "name": ", ".join(map(short_name, data.paths["train"])) or None,
            "fingerprint": data.fingerprint("train"),
            "examples": len(data.keys("train")),
            "responses": data.kind,
            "languages": list(data.languages),
        },
        "versions": {package: found for package in PACKAGES if (found := _version(package)) is not None},
    }


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """The name of ``optimizer`` and the options that it was made with, even if a checkpoint has changed them since."""
    return {"name": type(optimizer).__name__, **_plain(optimizer.defaults, type(optimizer))}


def describe_objective(objective: Objective) -> dict[str, Any]:
    """The name of ``objective`` and its options."""
    options: dict[str, Any] = {}
    for name in inspect.signature(type(objective)).parameters:
        value = getattr(objective, name)
        parts = isinstance(value, list | tuple)
        options[name] = [describe_objective(v) if isinstance(v, Objective) else v for v in value] if parts else value
    return {"name": type(objective).__name__, **options}


def describe_consistency(settings: Consistency) -> dict[str, Any]:
    """The terms that are on, and the settings of their representations. Empty if no term is on."""
    if not settings.terms:
        return {}
    described: dict[str, Any] = {term.name: _plain(dataclasses.asdict(term), type(term)) for term in settings.terms}
    if settings.needs.representations:
        described |= {name: getattr(settings, name) for name in _REPRESENTATION}
    return described | {"every_n_steps": settings.every_n_steps}


def _reference(settings: ReferenceSettings) -> dict[str, Any]:
    return dataclasses.asdict(settings) if settings.is_updated else {"mode": settings.mode}


def _schedule(scheduler: Any) -> dict[str, Any]:
    options = ("warmup", "decay", "final", "total_steps", "from_zero") if isinstance(scheduler, Warmup) else ()
    return {"name": type(scheduler).__name__, **{name: getattr(scheduler, name) for name in options}}


def _plain(options: dict[str, Any], owner: type) -> dict[str, Any]:
    """The ``options`` of ``owner`` that are numbers, texts, switches, or lists of them.

    A switch that is off by default is left out when it is off. An optimizer has many of them.
    """
    kept = (bool, int, float, str)
    parameters = inspect.signature(owner).parameters
    found: dict[str, Any] = {}
    for name, value in options.items():
        if value is False and name in parameters and parameters[name].default is False:
            continue
        if isinstance(value, kept):
            found[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(item, kept) for item in value):
            found[name] = list(value)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
