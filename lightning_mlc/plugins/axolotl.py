"""The MLC loss in Axolotl: a plug-in for its configuration.

::

    plugins:
      - lightning_mlc.plugins.axolotl.MLCPlugin
    mlc:
      prompts: prompts.jsonl
      weight: 0.8

Written for the hooks of Axolotl 0.18 to 0.21 (``axolotl/integrations/base.py``, documented at
https://docs.axolotl.ai/docs/custom_integrations.html).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from lightning_mlc.errors import UserError
from lightning_mlc.plugins.options import MLCOptions, add_from_block, check_prompts, checked

try:
    from axolotl.integrations.base import BasePlugin
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "axolotl":
        raise
    raise ModuleNotFoundError(
        "lightning_mlc.plugins.axolotl is a plug-in of Axolotl, which is not installed: pip install axolotl",
        name="axolotl",
    ) from error

if TYPE_CHECKING:
    _Base = object
else:
    _Base = BasePlugin


class MLCArgs(BaseModel):
    """What the plug-in adds to Axolotl's configuration."""

    mlc: MLCOptions | None = None  # type: ignore[valid-type]
    """``prompts``, a file, and options of :class:`~lightning_mlc.plugins.regularizer.MLCRegularizer`."""


class MLCPlugin(_Base):
    """Adds the MLC loss to the trainer that Axolotl makes, of any kind (SFT, DPO, KTO, ORPO, SimPO, ...).

    Raises:
        UserError: The configuration has no ``mlc:`` block, or an option or a prompt of it is wrong. Axolotl stops
            before it loads the model.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the ``mlc:`` block of the configuration."""
        if cfg.get("mlc") is None:
            raise UserError("mlc", "is missing; add a block such as {prompts: prompts.jsonl}, or remove the plug-in")
        check_prompts(checked(cfg["mlc"]))

    def get_input_args(self) -> str:
        """Return the path of the class that describes the plug-in's part of the configuration."""
        return f"{MLCArgs.__module__}.{MLCArgs.__qualname__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Add the loss to ``trainer``."""
        # Axolotl keeps a plug-in for later configurations of its process, which need not have the block.
        if cfg.mlc is not None:
            add_from_block(trainer, {name: value for name, value in cfg.mlc.items() if value is not None})
