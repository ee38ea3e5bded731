"""Packed rows for each attention implementation of transformers: how to lay them out, and which mask to pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import Packing, TokenRows

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Types of layers in which a mask can separate packed sequences. Recurrent layers, for example, take no mask."""


def packed_layout(implementation: str) -> Layout | None:
    """Return how to pack rows for an attention implementation.

    Args:
        implementation: Name of the implementation, as in ``model.attn_implementation``.

    Returns:
        The layout. None: unknown implementation, rows cannot be packed.
    """
    if implementation.startswith("flash_attention"):
        # It takes the ends of sequences but no mask, so that two responses cannot share a prompt.
        return Layout(packed=True, share_prompts=False, one_row=True)
    if implementation == "flex_attention":
        return Layout(packed=True, one_row=True)
    if implementation in ("sdpa", "eager"):
        return Layout(packed=True)
    return None


def packed_layout_of(config: PreTrainedConfig, implementation: str) -> Layout | None:
    """Return how to pack rows for a model.

    Args:
        config: Configuration of the model.
        implementation: Name of its attention implementation.

    Returns:
        The layout. None: the implementation or a type of layer does not support packed rows.
    """
    types = set(getattr(config.get_text_config(), "layer_types", None) or LAYER_TYPES)
    return packed_layout(implementation) if types <= LAYER_TYPES else None


def attention_arguments(config: PreTrainedConfig, rows: TokenRows, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keywords of a decoder's forward pass that say which tokens see which.

    Args:
        config: Configuration of the model.
        rows: The rows, padded or packed.
        dtype: Dtype of the weights.
    """
    packing = rows.packing
    if packing is None:
        return {"attention_mask": rows.attention_mask}
    implementation = str(config._attn_implementation)
    if implementation.startswith("flash_attention"):
        ends = {"cu_seq_lens_q": packing.boundaries, "cu_seq_lens_k": packing.boundaries}
        return {"attention_mask": None, **ends, "max_length_q": packing.longest, "max_length_k": packing.longest}
    windows = _windows(config, packing.longest)
    masks = {window: _mask(implementation, rows, packing, window, dtype) for window in set(windows.values())}
    if len(masks) == 1:
        return {"attention_mask": next(iter(masks.values()))}
    # Models with several types of layers take one mask per type.
    return {"attention_mask": {kind: masks[window] for kind, window in windows.items()}}


def _windows(config: PreTrainedConfig, longest: int) -> dict[str, int | None]:
    """Number of tokens that the layers of each type see, back from each token. None: all tokens before it."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= longest:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return {"every layer": window if getattr(config, "use_sliding_window", True) else None}
    return {kind: window if kind == "sliding_attention" else None for kind in types}


def _mask(implementation: str, rows: TokenRows, packing: Packing, window: int | None, dtype: torch.dtype) -> Any:
    segment, prompt, position = packing.segment, packing.prompt, rows.position_ids

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = segment[row, key] == segment[row, query]
        found = (query >= key) & (own | (segment[row, key] == prompt[row, query]))
        if window is None:
            return found
        return found & (position[row, query] - position[row, key] < window)

    count, width = rows.input_ids.shape
    if implementation == "flex_attention":
        return create_block_mask(sees, count, None, width, width, device=str(segment.device))
    index = torch.arange(width, device=segment.device)
    row = torch.arange(count, device=segment.device)[:, None, None]
    mask = sees(row, row, index[:, None], index)[:, None]
    if implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask
