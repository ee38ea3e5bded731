"""Check from its configuration, before the weights are read, that a model suits a run."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedConfig

from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.parts import learnt_positions, token_embeddings
from lightning_mlc.sources import ModelSource

logger = logging.getLogger("lightning_mlc")

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary positions whose frequencies depend on the longest sequence of a pass."""


def require_fitting(
    source: ModelSource,
    config: PreTrainedConfig,
    lora: LoRA | None,
    attn_implementation: str | None,
    highest_token: int,
    longest_sequence: int,
) -> None:
    """Refuse data or adapters that do not fit the model.

    Args:
        source: The model.
        config: Its configuration.
        lora: Settings of the adapters that will be added. None: no adapters.
        attn_implementation: The option ``model.attn_implementation``.
        highest_token: Highest token id in the data.
        longest_sequence: Largest number of tokens in a prompt and its response.

    Raises:
        UserError: The model has fewer embeddings or positions than the data needs, or shares weights that would get
            adapters.
    """
    _warn_about_positions(config, longest_sequence)
    try:
        shell = load_causal_lm(source, torch.float32, attn_implementation, weights=False)
    except UserError:
        raise
    except Exception:  # the model's own code may not run without weights; then this check is left out
        return
    rows = token_embeddings(shell)
    if rows is not None and highest_token >= rows:
        raise UserError(
            "model.name_or_path",
            f"the tokenizer gives ids up to {highest_token}, but {source} embeds {rows} tokens (0 to {rows - 1}); "
            "give the model its own tokenizer, or resize its embeddings",
        )
    places = learnt_positions(shell)
    if places is not None and longest_sequence > places:
        raise UserError(
            "data.max_prompt_length",
            f"a prompt and its response have up to {longest_sequence} tokens, but {source} has learnt {places} "
            f"positions; choose max_prompt_length and max_response_length with a sum of {places}",
        )
    if lora is not None:
        add_lora(shell, lora)


def _warn_about_positions(config: PreTrainedConfig, longest_sequence: int) -> None:
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in (parameters, *nested):
        kind = rope.get("rope_type", rope.get("type"))
        own = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", 0)
        original = int(rope.get("original_max_position_embeddings") or own or 0)
        if kind in LENGTH_DEPENDENT and longest_sequence > original:
            logger.warning(
                "positions of type %s depend on the longest sequence of a pass beyond %d tokens; the data has up to "
                "%d: results of longer sequences, and of sequences in the same batch, depend on the batch",
                kind,
                original,
                longest_sequence,
            )
            return
