"""Layers of a model: how many it has, and which one an option names."""

from __future__ import annotations

from typing import Any, Final, Literal

from torch import Tensor

from lightning_mlc.errors import UserError

AUTO: Final = "auto"
Layer = int | float | Literal["auto"]
"""What ``model.consistency.layer`` may be. ``auto`` becomes an integer before training."""


def num_layers(config: Any) -> int:
    """Return the number of decoder layers of a model.

    Args:
        config: Configuration of the model. For a multimodal model, the layers of its text part count.
    """
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def resolve_layer(layer: int | float, depth: int) -> int:
    """Return the index of the layer that ``model.consistency.layer`` names.

    Args:
        layer: An integer is an index into the hidden states (0: embeddings, 1: after the first layer, ..., ``depth``
            or -1: after the last layer and the final norm). A float is a fraction of the depth (0.5: the middle
            layer).
        depth: Number of decoder layers.

    Returns:
        An index from 0 to ``depth``.

    Raises:
        UserError: The model has no such layer.
    """
    if isinstance(layer, float):
        if not 0.0 <= layer <= 1.0:
            raise UserError(
                "model.consistency.layer", f"{layer} is not a fraction of depth; give 0.0 to 1.0, or an integer"
            )
        return round(layer * depth)
    resolved = layer + depth + 1 if layer < 0 else layer
    if not 0 <= resolved <= depth:
        raise UserError(
            "model.consistency.layer",
            f"the model has no layer {layer}; it has {depth} layers, "
            f"so give {-depth - 1} to {depth}, or a fraction such as 0.5",
        )
    return resolved


def highest_layer(layer: Layer, depth: int) -> int:
    """Return the index of the highest layer that ``layer`` may become in a model of ``depth`` layers.

    Raises:
        UserError: The model has no such layer.
    """
    return depth if layer == AUTO else resolve_layer(layer, depth)


def require_one_state(states: Tensor, layer: int, name: str) -> None:
    """Refuse a layer with several hidden states for each token, of which terms could not tell which to compare.

    Args:
        states: Hidden states of the layer, (R, T, H) if each token has one.
        layer: Index of the layer.
        name: Name of the model's class.

    Raises:
        UserError: ``states`` has another number of dimensions.
    """
    if states.ndim != 3:
        raise UserError(
            "model.consistency.layer",
            f"layer {layer} of {name} has {states.shape[-2]} hidden states for each token; "
            "set it to -1 (after the last layer), where each token has one",
        )
