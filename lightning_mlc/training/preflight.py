"""Everything that a run can be refused for before its model is loaded."""

from __future__ import annotations

from dataclasses import replace

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy

from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.distributed.sharding import FSDP2, require_supported
from lightning_mlc.errors import UserError
from lightning_mlc.lightning_internals import finds_unused_parameters
from lightning_mlc.models.layers import Layer, num_layers
from lightning_mlc.models.loading import dtype_of
from lightning_mlc.processes import require_same
from lightning_mlc.reference import ReferenceSettings
from lightning_mlc.sources import load_config
from lightning_mlc.training.building import PolicyBuilder
from lightning_mlc.training.declined import Declined
from lightning_mlc.training.layer_choice import layer_of_run
from lightning_mlc.training.losses import Losses


def check_options(builder: PolicyBuilder, trainer: Trainer, sharding: FSDP2 | None) -> None:
    """Refuse options of the model that the device, the precision or the strategy rules out.

    Raises:
        UserError: Names the option.
    """
    precision = str(trainer.precision)
    dtype_of(precision)
    require_same("trainer.precision", precision)
    require_supported(trainer.strategy)
    if sharding is not None:
        builder.require_shardable(sharding)
    builder.require_device(trainer.strategy.root_device)


def check_data(
    losses: Losses,
    reference: ReferenceSettings,
    declined: Declined | None,
    data: MultilingualData,
    trainer: Trainer,
    adapters: bool,
    stage: str,
) -> None:
    """Refuse data that the objective or a consistency term cannot be computed on, and tell ``data`` which rows to run.

    Args:
        losses: The objective and the consistency terms.
        reference: Where reference scores come from.
        declined: Which prompts a validation answers; None: none.
        data: The data, set up.
        trainer: Its strategy matters where some parameters get no gradient.
        adapters: Whether adapters are trained.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        UserError: Names the option.
    """
    objective, consistency = losses.objective, losses.consistency
    reference.check(objective, consistency.needs, adapters=adapters)
    if stage == "predict":
        return
    if objective is not None:
        objective.check_data(data.kind)
    consistency.require_pairs(data.kind == "pairs")
    if declined is None:
        require_other_monitors(trainer)
    else:
        require_whole_validation(data, trainer, stage)
    data.plan_rows(replace(losses.row_plan, answered=0 if declined is None else declined.prompts))
    if stage == "fit":
        consistency.require_languages(data.languages)
        sizes = data.sizes("train")
        consistency.require_rows(int(sizes.groups.sum()), int(sizes.ordinary_groups.sum()))
        consistency.require_several_prompts(None if data.tokens_per_batch is not None else data.batch_size)
        require_gradients_everywhere(losses, trainer.strategy)
        data.check_steps()


def require_other_monitors(trainer: Trainer) -> None:
    """Raises:
    UserError: A callback follows a metric that only ``model.declined`` gives.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        monitor = str(getattr(callback, "monitor", None))
        if monitor.startswith("val/declined/"):
            option = "checkpoint.monitor" if isinstance(callback, ModelCheckpoint) else "trainer.callbacks"
            raise UserError(option, f"{monitor} is measured with model.declined only, which is null")


def require_whole_validation(data: MultilingualData, trainer: Trainer, stage: str) -> None:
    """Raises:
    UserError: ``model.declined`` is set, and nothing is validated, or only a part of the prompts would be answered.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a smoke test
        return
    if stage == "fit" and (not data.keys("val") or trainer.limit_val_batches == 0):
        raise UserError(
            "model.declined",
            "prompts are answered at validations, and nothing is validated; give data.val_path or data.val_share, and "
            "do not set trainer.limit_val_batches to 0; or set it to null",
        )
    option = f"limit_{'test' if stage == 'test' else 'val'}_batches"
    limit = getattr(trainer, option)
    if not isinstance(limit, float) or limit != 1:
        raise UserError(
            f"trainer.{option}",
            f"is {limit}, so some prompts of model.declined would not be answered; leave it out, and give fewer rows, "
            "or lower model.declined.prompts",
        )


def require_gradients_everywhere(losses: Losses, strategy: Strategy) -> None:
    """Refuse parameters without a gradient under DDP, which would fail in its second step.

    Raises:
        UserError: The head gets no gradient, and ``strategy`` does not look for such parameters.
    """
    needs = losses.consistency.needs
    headless = losses.objective is None and not needs.responses and not needs.positions
    if headless and not finds_unused_parameters(strategy):
        raise UserError(
            "trainer.strategy",
            "hidden states alone give the head no gradient, and model.objective is null; "
            "set it to ddp_find_unused_parameters_true",
        )


def check_model(
    builder: PolicyBuilder,
    layer: Layer,
    data: MultilingualData,
    trainer: Trainer,
    sharding: FSDP2 | None,
    stage: str,
) -> int | None:
    """Refuse a model whose configuration rules the run out, and resolve ``layer``.

    Args:
        builder: Knows where the model comes from.
        layer: ``model.consistency.layer``.
        data: Its longest sequence and its highest token must fit the model.
        trainer: Its precision and device matter.
        sharding: The strategy, if it shards the model.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        Index of the layer whose hidden states are compared. None: it is to be chosen when the model is loaded.

    Raises:
        UserError: Names the option.
    """
    config = load_config(builder.source)
    builder.require_loadable(config, str(trainer.precision), trains=stage == "fit")
    if sharding is not None:
        sharding.require_splittable(config)
    index = layer_of_run(layer, num_layers(config), trainer, stage)
    builder.require_fitting(config, data.highest_token(), data.extent().longest_sequence)
    if stage != "predict":
        builder.require_compiler(trainer.strategy.root_device)
    return index
