"""A Hugging Face causal LM as the training step uses it.

One pass over token rows gives the log-probabilities of their response tokens and, if asked for, the
hidden state of one layer at the end of each prompt. Nothing else is computed or kept: logits exist for
response tokens only and a chunk at a time, and rows without a response skip ``lm_head``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_mlc.data.batches import TokenRows
from lightning_mlc.errors import UserError
from lightning_mlc.models.compiling import compile_layers
from lightning_mlc.models.logprobs import CHUNK_ELEMENTS, head_agrees, logps_of, token_logps

if TYPE_CHECKING:
    from peft import PeftModel


class RowOutputs(NamedTuple):
    """What one pass over N rows gives."""

    logps: Tensor
    """(N,) float32 (float64 of a float64 model), summed log-probability of the response's tokens (0 without one)."""
    tokens: Tensor
    """(N,) float32, number of response tokens."""
    states: Tensor | None
    """(N, H), hidden state of the layer asked for at the last prompt token."""


class Policy(nn.Module):
    """Wraps ``model``: any ``transformers`` causal LM, or a ``peft`` model around one."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        self._accepted = frozenset(inspect.signature(self.causal_lm.forward).parameters)
        self._in_two_parts: bool | None = None
        """Whether decoder and head can be run one after the other; None until the first responses come."""
        self._compiled = False

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal LM itself, inside ``peft``'s wrapper if there is one."""
        model: Any = self.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        assert isinstance(inner, PreTrainedModel)
        return inner

    def compile_layers(self) -> None:
        """Compile the decoder layers in place, those of copies of this policy too."""
        compile_layers(self._decoder_layers())
        self._compiled = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._compiled:  # torch leaves what it compiled out of copies
            self.compile_layers()

    def forward(self, rows: TokenRows, layer: int | None = None) -> RowOutputs:
        """Run ``rows``; ``layer`` (0 embeddings, ..., n after the final norm) asks for its hidden states."""
        count = len(rows)
        device = rows.input_ids.device
        # Asked first, for the answer may take a pass of its own, which must not be captured.
        in_two_parts = rows.logits_to_keep > 0 and self._runs_in_two_parts(rows)
        with self._capture(layer) as captured:
            if rows.logits_to_keep == 0:
                self._run(self.causal_lm.base_model, rows)
                logps = torch.zeros(count, device=device)
            elif in_two_parts:
                hidden = self._run(self.causal_lm.base_model, rows)[0]
                predicting = hidden.flatten(0, 1).index_select(0, rows.response - 1)
                logps = _sum_by_row(token_logps(self.causal_lm, predicting, _labels(rows), CHUNK_ELEMENTS), rows)
            else:
                logps = _sum_by_row(logps_of(self._response_logits(rows), _labels(rows)), rows)
        tokens = _sum_by_row(torch.ones(len(rows.response), device=device), rows)
        states = None
        if captured:
            # Gathered here and not in the hook: under gradient checkpointing the hook lies inside the
            # region that is run again in the backward pass, where it must add no operation.
            states = captured[0][torch.arange(count, device=device), rows.prompt_end]
        return RowOutputs(logps, tokens, states)

    def _runs_in_two_parts(self, rows: TokenRows) -> bool:
        if self._in_two_parts is None:
            # A few tokens are enough, and any will do. Compiled layers are not compiled for their sake.
            with torch.compiler.set_stance("force_eager"):
                self._in_two_parts = head_agrees(self.causal_lm, rows.input_ids[:1, -8:])
        return self._in_two_parts

    def _response_logits(self, rows: TokenRows) -> Tensor:
        """(M, V), logits that predict the response tokens, from the model's own forward pass."""
        keep = rows.logits_to_keep
        logits: Tensor = self._run(self.model, rows, logits_to_keep=keep).logits[:, -keep:]
        length = rows.input_ids.shape[1]
        row, column = rows.response // length, rows.response % length
        return logits[row, column - 1 - (length - keep)]

    def _run(self, module: nn.Module, rows: TokenRows, **keywords: Any) -> Any:
        keywords = {name: value for name, value in keywords.items() if name in self._accepted}
        if "position_ids" in self._accepted:
            # Positions count tokens, not padding: a row means the same on whichever side it is padded.
            keywords["position_ids"] = (rows.attention_mask.cumsum(1) - 1).clamp(min=0)
        return module(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False, **keywords)

    @contextmanager
    def _capture(self, layer: int | None) -> Iterator[list[Tensor]]:
        """Collect the hidden states of ``layer`` during the forward pass inside the context."""
        captured: list[Tensor] = []
        if layer is None:
            yield captured
            return

        def keep_input(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not captured:
                captured.append(inputs[0] if inputs else keywords["hidden_states"])

        def keep_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured.append(output[0])

        if layer == num_layers(self.causal_lm.config):
            # What the decoder returns: after the last layer and the final norm.
            handle = self.causal_lm.base_model.register_forward_hook(keep_output)
        else:
            # What goes into the next layer: also right where a model scales its embeddings first.
            handle = self._decoder_layers()[layer].register_forward_pre_hook(keep_input, with_kwargs=True)
        try:
            yield captured
        finally:
            handle.remove()

    def _decoder_layers(self) -> nn.ModuleList:
        depth = num_layers(self.causal_lm.config)
        for module in self.causal_lm.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise UserError(
            f"model.name_or_path: cannot find the {depth} layers of {type(self.causal_lm).__name__}; "
            "leave model.compile at false and model.mlc.layer at -1"
        )


def num_layers(config: Any) -> int:
    """Number of decoder layers of a model with ``config`` (the text part of a multimodal one)."""
    return int(config.get_text_config().num_hidden_layers)


def resolve_layer(layer: int | float, depth: int) -> int:
    """The layer that ``model.mlc.layer`` names in a model of ``depth`` layers.

    Args:
        layer: An integer is an index into the hidden states (0 embeddings, 1 after the first layer, ...,
            ``depth`` or -1 after the last layer and the final norm). A float is a fraction of the depth
            (0.5: the middle layer).
        depth: Number of decoder layers.

    Raises:
        UserError: The model has no such layer.
    """
    if isinstance(layer, float):
        if not 0.0 <= layer <= 1.0:
            raise UserError(f"model.mlc.layer: {layer} is not a fraction of depth; give 0.0 to 1.0, or an integer")
        return round(layer * depth)
    resolved = layer + depth + 1 if layer < 0 else layer
    if not 0 <= resolved <= depth:
        raise UserError(
            f"model.mlc.layer: the model has no layer {layer}; it has {depth} layers, "
            f"so give {-depth - 1} to {depth}, or a fraction such as 0.5"
        )
    return resolved


def _labels(rows: TokenRows) -> Tensor:
    """(M,) int64, the response tokens of all rows."""
    return rows.input_ids.flatten().index_select(0, rows.response)


def _sum_by_row(values: Tensor, rows: TokenRows) -> Tensor:
    """(N,) sums of ``values`` (M,), one for each response token."""
    # Laid out first: sums by index have no fixed order on a GPU.
    count, length = rows.input_ids.shape
    return values.new_zeros(count * length).index_copy(0, rows.response, values).view(count, length).sum(1)
