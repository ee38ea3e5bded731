"""A Hugging Face causal LM as the training step uses it.

One pass over token rows gives the log-probabilities of their response tokens and, if asked for, the
hidden state of one layer at the end of each prompt. Nothing else is computed or kept: logits exist for
response tokens only and a chunk at a time, and prompts alone run neither ``lm_head`` nor the layers above.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_mlc.data.rows import TokenRows
from lightning_mlc.errors import UserError
from lightning_mlc.models.attention import attention_arguments
from lightning_mlc.models.compiling import compile_layers, uncompiled
from lightning_mlc.models.logprobs import CHUNK_ELEMENTS, head_agrees, logps_of, token_logps

if TYPE_CHECKING:
    from peft import PeftModel


class RowOutputs(NamedTuple):
    """What one pass over N sequences gives."""

    logps: Tensor
    """(N,) float32 (float64 of a float64 model), summed log-probability of the response's tokens (0 without one)."""
    tokens: Tensor
    """(N,) float32, number of response tokens."""
    states: Tensor | None
    """(N, H), hidden state of the layer asked for at the last prompt token."""
    pooled: Tensor | None = None
    """(N, H) float32 (float64 of a float64 model), mean over its tokens of the state after the final norm."""


class Policy(nn.Module):
    """Wraps ``model``: any ``transformers`` causal LM, or a ``peft`` model around one."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        self._accepted = frozenset(inspect.signature(self.causal_lm.forward).parameters)
        self.in_two_parts: bool | None = None
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
        compile_layers(self._layers()[2])
        self._compiled = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._compiled:  # torch leaves what it compiled out of copies
            self.compile_layers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model, but leave to ``transformers`` in which precision its constants are.

        Lightning converts whatever is floating point when the whole model is in half precision. Rotary frequencies
        would be rounded, and every position with them, unlike in the model that was loaded and the one exported.
        """
        constants = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, before in constants:
            after = getattr(module, name)
            if after.dtype != before.dtype:
                setattr(module, name, before.to(after.device))
        return self

    def forward(self, rows: TokenRows, layer: int | None = None, pool: bool = False) -> RowOutputs:
        """Run ``rows``; ``layer`` (0 embeddings, ..., n after the final norm) asks for its hidden states.

        Prompts alone are run up to that layer and no further. ``pool`` asks, of rows with responses, for the
        means of the last hidden states.
        """
        count, device = len(rows), rows.input_ids.device
        pooled = None
        if rows.longest_response == 0:
            states = None if layer is None else self._states_only(rows, layer)
            logps = torch.zeros(count, device=device)
        else:
            # Asked first, for the answer may take a pass of its own, which must not be captured.
            in_two_parts = self._runs_in_two_parts(rows)
            top = num_layers(self.causal_lm.config) if pool else None
            with self._capture(layer) as captured, self._capture(top) as last:
                if in_two_parts:
                    hidden = self._run(self.causal_lm.base_model, rows)[0]
                    predicting = hidden.flatten(0, 1).index_select(0, rows.predictor)
                    logps = token_logps(self.causal_lm, predicting, _labels(rows), CHUNK_ELEMENTS)
                else:
                    logits = self._run(self.model, rows).logits.flatten(0, 1)
                    logps = logps_of(logits.index_select(0, rows.predictor), _labels(rows))
            logps = _sum_by_sequence(logps, rows)
            states = captured[0] if captured else None
            pooled = _mean_by_sequence(last[0], rows) if last else None
        if states is not None:
            # Gathered here and not in a hook: under gradient checkpointing a hook lies inside the region
            # that is run again in the backward pass, where it must add no operation.
            states = states.flatten(0, 1).index_select(0, rows.prompt_end)
        return RowOutputs(logps, rows.response_tokens.float(), states, pooled)

    def generate(self, rows: TokenRows, max_new_tokens: int, ends: list[int], together: bool) -> Tensor:
        """(N, T + S) int64: the prompts ``rows`` (N, T, padded on the left) and greedy responses of S tokens at most.

        Args:
            rows: Prompts, one a row.
            max_new_tokens: Longest response.
            ends: Ids that end one.
            together: Whether processes meet in every pass, and so go on until the last response of any is complete.
        """
        generated: Tensor = self.causal_lm.generate(  # type: ignore[operator]
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            do_sample=False,
            synced_gpus=together,
        )
        return generated

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self._layers()[2]

    def _runs_in_two_parts(self, rows: TokenRows) -> bool:
        if self.in_two_parts is None:
            # A few tokens are enough, and any will do.
            with uncompiled():
                self.in_two_parts = head_agrees(self.causal_lm, rows.input_ids[:1, -8:])
        return self.in_two_parts

    def _run(self, module: nn.Module, rows: TokenRows) -> Any:
        keywords = attention_arguments(self.causal_lm.config, rows, self.causal_lm.dtype)
        if "position_ids" in self._accepted:
            keywords["position_ids"] = rows.position_ids
        return module(input_ids=rows.input_ids, use_cache=False, **keywords)

    @contextmanager
    def _capture(self, layer: int | None) -> Iterator[list[Tensor]]:
        """Collect the hidden states (R, T, H) of ``layer`` during the forward pass inside the context."""
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
            handle = self._layers()[2][layer].register_forward_pre_hook(keep_input, with_kwargs=True)
        try:
            yield captured
        finally:
            handle.remove()

    def _states_only(self, rows: TokenRows, layer: int) -> Tensor:
        """(R, T, H), hidden states of ``layer``, of a pass that ends there."""
        decoder = self.causal_lm.base_model
        if layer == num_layers(self.causal_lm.config):
            states: Tensor = self._run(decoder, rows)[0]
            return states
        owner, name, layers = self._layers()
        end = _End(layers[layer])
        # The decoder runs what layers it finds in the place of its own; no architecture need be known for that.
        setattr(owner, name, nn.ModuleList([*layers[:layer], end]))
        try:
            self._run(decoder, rows)
        finally:
            setattr(owner, name, layers)
        assert end.states is not None
        return end.states

    def _layers(self) -> tuple[nn.Module, str, nn.ModuleList]:
        """The decoder's layers, the module that they are an attribute of, and its name."""
        depth = num_layers(self.causal_lm.config)
        for owner in self.causal_lm.base_model.modules():
            for name, module in owner.named_children():
                if isinstance(module, nn.ModuleList) and len(module) == depth:
                    return owner, name, module
        raise UserError(
            "model.name_or_path",
            f"cannot find the {depth} layers of {type(self.causal_lm).__name__}; "
            "leave model.compile at false and model.consistency.layer at -1",
        )


class _End(nn.Module):
    """Stands in the place of the first layer that need not be run, and keeps what went into it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._replaced = (layer,)  # in a tuple, so as not to become a child
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Some decoders ask a layer for its type before they run it.
        return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, hidden_states: Tensor, *_arguments: Any, **_keywords: Any) -> Tensor:
        self.states = hidden_states
        return hidden_states


def num_layers(config: Any) -> int:
    """Number of decoder layers of a model with ``config`` (the text part of a multimodal one)."""
    return int(config.get_text_config().num_hidden_layers)


def resolve_layer(layer: int | float, depth: int) -> int:
    """The layer that ``model.consistency.layer`` names in a model of ``depth`` layers.

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


def _labels(rows: TokenRows) -> Tensor:
    """(M,) int64, the response tokens of all sequences."""
    return rows.input_ids.flatten().index_select(0, rows.response)


def _sum_by_sequence(values: Tensor, rows: TokenRows) -> Tensor:
    """(N,) sums of ``values`` (M,), one for each response token."""
    # Laid out first: sums by index have no fixed order on a GPU.
    table = values.new_zeros(len(rows) * rows.longest_response)
    return table.index_copy(0, rows.response_cell, values).view(len(rows), -1).sum(1)


def _mean_by_sequence(hidden: Tensor, rows: TokenRows) -> Tensor:
    """(N, H) means of ``hidden`` (R, T, H) over the tokens of each sequence, its prompt and its response."""
    place = torch.arange(rows.input_ids.numel(), device=hidden.device)
    end = rows.prompt_end[:, None]
    start = end - rows.position_ids.flatten()[end]
    belongs = (start <= place) & (place <= end)
    belongs[rows.response_cell // rows.longest_response, rows.response] = True
    # Padding may hold anything, NaN too. A product in full precision: sums by index have no fixed order on a GPU.
    wide = torch.where(rows.attention_mask[:, :, None] == 1, hidden, 0.0).flatten(0, 1)
    wide = wide.to(torch.promote_types(hidden.dtype, torch.float32))
    with torch.autocast(hidden.device.type, enabled=False):
        return belongs.to(wide.dtype) @ wide / belongs.sum(1, keepdim=True)
