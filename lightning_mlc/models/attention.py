"""Packed rows for each attention implementation of transformers: the layout it runs best, and the mask it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import Packing, TokenRows

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""What a layer may be for packed sequences not to see each other. Recurrent layers, say, take no mask."""


def packed_layout(implementation: str) -> Layout | None:
    """How to pack rows for ``implementation`` (``model.attn_implementation``); None where it is not known how."""
    if implementation.startswith("flash_attention"):
        # Takes the ends of sequences, and no mask that would let two responses see one prompt.
        return Layout(packed=True, share_prompts=False, one_row=True)
    if implementation == "flex_attention":
        return Layout(packed=True, one_row=True)
    if implementation in ("sdpa", "eager"):
        return Layout(packed=True)
    return None


def packed_layout_of(config: PreTrainedConfig, implementation: str) -> Layout | None:
    """How to pack rows of a model with ``config``; None where its attention or its kinds of layers rule that out."""
    types = set(getattr(config.get_text_config(), "layer_types", None) or LAYER_TYPES)
    return packed_layout(implementation) if types <= LAYER_TYPES else None


def attention_arguments(config: PreTrainedConfig, rows: TokenRows, dtype: torch.dtype) -> dict[str, Any]:
    """What a decoder with ``config`` and weights in ``dtype`` is told about which tokens of ``rows`` see which."""
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
    # Models whose layers differ take a mask for each of their types.
    return {"attention_mask": {kind: masks[window] for kind, window in windows.items()}}


def _windows(config: PreTrainedConfig, longest: int) -> dict[str, int | None]:
    """How far back the layers of each type see, None for to the beginning."""
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
