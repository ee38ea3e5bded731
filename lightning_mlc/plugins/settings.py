"""Which values the options of the loss may have. Needs no model, so that a fault is told before one is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from lightning_mlc.consistency import MLC, Consistency
from lightning_mlc.errors import UserError, did_you_mean
from lightning_mlc.models.layers import AUTO, Layer, resolve_layer

LARGEST_SEED = 2**32 - 1
"""NumPy and the Trainer of transformers take no larger one."""


def settings_of(
    *,
    weight: float,
    temperature: float,
    scale: Literal["top", "none"],
    layer: Layer,
    extractor: Literal["frozen", "linear", "none"],
    extractor_dim: int,
    every_n_steps: int,
    prompts_per_step: int,
    max_prompt_length: int,
    center: bool,
    seed: int,
) -> Consistency:
    """Check the options of :class:`~lightning_mlc.plugins.regularizer.MLCRegularizer`, and return the loss's settings.

    Raises:
        UserError: An option has a wrong type or is out of range. It is named as there.
    """
    if layer == AUTO:
        raise no_auto("layer")
    for name, number in {"weight": weight, "temperature": temperature, "layer": layer}.items():
        _require_type(name, number, (int, float), "a number")
    for name, count in {
        "extractor_dim": extractor_dim,
        "every_n_steps": every_n_steps,
        "prompts_per_step": prompts_per_step,
        "max_prompt_length": max_prompt_length,
        "seed": seed,
    }.items():
        _require_type(name, count, (int,), "an integer")
    if not isinstance(center, bool):
        raise UserError("center", f"must be true or false, got {center!r}")
    _require_one_of("scale", scale, ("top", "none"))
    _require_one_of("extractor", extractor, ("frozen", "linear", "none"))
    for name, count in {"prompts_per_step": prompts_per_step, "max_prompt_length": max_prompt_length}.items():
        if count < 1:
            raise UserError(name, f"must be at least 1, got {count}")
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError("seed", f"must be from 0 to {LARGEST_SEED}, got {seed}")
    try:
        if isinstance(layer, float):
            resolve_layer(layer, depth=1)  # a fraction is right or wrong at any depth, an index is not
        return Consistency(
            mlc=MLC(weight, temperature, scale),
            layer=layer,
            extractor=extractor,
            extractor_dim=extractor_dim,
            center=center,
            every_n_steps=every_n_steps,
        )
    except UserError as error:
        # As `model.consistency.mlc.weight`, the configuration of the product has it.
        raise error.of(str(error.option).rsplit(".", 1)[-1]) from error


def _require_type(option: str, value: object, types: tuple[type, ...], named: str) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise UserError(option, f"must be {named}, got {value!r}")


def no_such_option(option: str, name: str, known: Sequence[str]) -> UserError:
    """The error for the unknown ``name`` of an option, which messages call ``option``."""
    return UserError(option, "is no option" + did_you_mean(name, known, f"; options are {', '.join(known)}"))


def no_auto(option: str) -> UserError:
    """The error for ``layer: auto``, whose ``option`` is named here. A plug-in has no model when options are read."""
    return UserError(
        option,
        f"{AUTO} is an option of `lightning-mlc fit`; give the number of a layer (the report of `lightning-mlc "
        "evaluate` says which one that would be), or a fraction such as 0.5",
    )


def _require_one_of(option: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UserError(option, f"must be one of {', '.join(allowed)}, got {value!r}")
