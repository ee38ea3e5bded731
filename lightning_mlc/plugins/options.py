"""The ``mlc:`` block in the configuration of another program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from lightning_mlc.data.reading import locate
from lightning_mlc.errors import UserError
from lightning_mlc.models.layers import AUTO
from lightning_mlc.plugins.prompts import read_prompts
from lightning_mlc.plugins.regularizer import OPTIONS, MLCRegularizer
from lightning_mlc.plugins.settings import no_auto, no_such_option, settings_of
from lightning_mlc.plugins.trainer import add_mlc

T = TypeVar("T", bound=Any)


OF_PROMPTS = ("languages", "source_language")
"""Options that choose among the prompts, and so are checked with them."""


def _model() -> type[BaseModel]:
    hints = get_type_hints(MLCRegularizer.__init__, localns={"Dataset": object})
    # None stands for "not given", because defaults depend on the trainer.
    fields: dict[str, Any] = {name: (hints[name] | None, None) for name in OPTIONS}
    return create_model("MLCOptions", __config__=ConfigDict(extra="forbid"), prompts=(str, ...), **fields)


MLCOptions = _model()
"""The options as a pydantic model: ``prompts``, the path of a file, and the options of ``MLCRegularizer``."""


def checked(block: Any) -> dict[str, Any]:
    """Check an ``mlc:`` block before anything is loaded, except for its prompts (:func:`check_prompts`).

    Args:
        block: ``prompts`` and options of :class:`~lightning_mlc.plugins.regularizer.MLCRegularizer`.

    Returns:
        The arguments of :func:`~lightning_mlc.plugins.trainer.add_mlc` that the block gives.

    Raises:
        UserError: It is no mapping, has no prompts or an unknown option, a value has a wrong type or is out of range,
            or there is no such file. Options are named ``mlc.NAME``.
    """
    if not isinstance(block, Mapping):
        raise UserError("mlc", "must be a block of options, such as {prompts: prompts.jsonl, weight: 0.8}")
    try:
        found = MLCOptions.model_validate(dict(block))
    except ValidationError as error:
        raise _first(error) from error
    options = found.model_dump(exclude_none=True)
    with _in_block():
        settings_of(**{name: options.get(name, default) for name, default in OPTIONS.items() if name not in OF_PROMPTS})
    locate(options["prompts"], "mlc.prompts")
    return options


def check_prompts(options: Mapping[str, Any]) -> None:
    """Read the prompts that ``options`` name, so that a fault in them is told before a model is loaded.

    Raises:
        UserError: As :func:`~lightning_mlc.plugins.prompts.read_prompts`. Options are named ``mlc.NAME``.
    """
    with _in_block():
        read_prompts(options["prompts"], **{name: options[name] for name in OF_PROMPTS if name in options})


def add_from_block(trainer: T, block: Mapping[str, Any]) -> T:
    """Add the MLC loss to a trainer with the options of an ``mlc:`` block.

    Raises:
        UserError: The block or the trainer cannot be used. Options are named ``mlc.NAME``.
    """
    options = checked(block)
    with _in_block():
        return add_mlc(trainer, **options)


@contextmanager
def _in_block() -> Iterator[None]:
    """Name the options of errors as the block has them."""
    try:
        yield
    except UserError as error:
        raise (error.of(f"mlc.{error.option}") if error.option in MLCOptions.model_fields else error) from error


def _first(error: ValidationError) -> UserError:
    """Return the first error as one line."""
    found = error.errors()[0]
    name = str(found["loc"][0])
    if name == "layer" and found["input"] == AUTO:
        return no_auto("mlc.layer")
    if found["type"] == "extra_forbidden":
        return no_such_option(f"mlc.{name}", name, list(MLCOptions.model_fields))
    if found["type"] == "missing":
        return UserError(f"mlc.{name}", "is missing; give a file of prompts in several languages")
    return UserError(f"mlc.{name}", f"cannot be {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}")
