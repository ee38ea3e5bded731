"""A Hugging Face causal LM as the training step uses it.

One pass over token rows gives the log-probabilities of their response tokens and, if asked for, the
hidden state of one layer at the end of each prompt. Nothing else is computed or kept: logits exist for
response tokens only and a chunk at a time, and prompts alone run neither ``lm_head`` nor the layers above.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_mlc.data.rows import TokenRows
from lightning_mlc.errors import UserError
from lightning_mlc.models.attention import attention_arguments
from lightning_mlc.models.compiling import compile_layers
from lightning_mlc.models.greedy import generate_greedily
from lightning_mlc.models.logprobs import CHUNK_ELEMENTS, logps_of, token_logps
from lightning_mlc.models.parts import find_decoder, find_layers, num_layers, submodule
from lightning_mlc.models.tensors import precision_kept

if TYPE_CHECKING:
    from peft import PeftModel


class Shortcuts(NamedTuple):
    """What a policy may do in a cheaper way than the plain one; each is on once it is known to give the same.

    :func:`~lightning_mlc.models.self_check.self_check` finds out which do.
    """

    hooks: bool = False
    """Take hidden states where they pass. Plain: ask the model for those of all layers."""
    two_parts: bool = False
    """Run the decoder, then the head for response tokens alone. Plain: make the logits of all tokens."""
    early_end: bool = False
    """End a pass over prompts alone at the layer asked for. Plain: run all layers."""


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
        self.decoder_name = find_decoder(self.causal_lm)
        """Name in the LM of what it runs between tokens and logits, if that is a module."""
        self.shortcuts = Shortcuts()
        """None is taken before it was tried."""
        self.layer_returns = 0
        """How many values a layer returns in a tuple, hidden states first; 0 where it returns them alone."""
        self._compiled = False

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal LM itself, inside ``peft``'s wrapper if there is one."""
        model: Any = self.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        assert isinstance(inner, PreTrainedModel)
        return inner

    @property
    def decoder(self) -> nn.Module | None:
        """What the LM runs between tokens and logits, if that is a module."""
        return None if self.decoder_name is None else submodule(self.causal_lm, self.decoder_name)

    def compile_layers(self) -> None:
        """Compile the decoder layers in place, those of copies of this policy too."""
        compile_layers(self._layers()[2])
        self._compiled = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._compiled:  # torch leaves what it compiled out of copies
            self.compile_layers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model. Lightning converts all of it where the precision is a half one."""
        with precision_kept(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
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
            depth = num_layers(self.causal_lm.config)
            wanted = [*([] if layer is None else [layer]), *([depth] if pool else [])]
            if self.shortcuts.two_parts:
                output, found = self._run(self._required_decoder(), rows, wanted)
                predicting = output[0].flatten(0, 1).index_select(0, rows.predictor)
                logps = token_logps(self.causal_lm, self.decoder_name, predicting, _labels(rows), CHUNK_ELEMENTS)
            else:
                output, found = self._run(self.model, rows, wanted)
                logits = output.logits.flatten(0, 1)
                logps = logps_of(logits.index_select(0, rows.predictor), _labels(rows))
            logps = _sum_by_sequence(logps, rows)
            states = None if layer is None else found[layer]
            pooled = _mean_by_sequence(found[depth], rows) if pool else None
        if states is not None:
            # Gathered here and not in a hook: under gradient checkpointing a hook lies inside the region
            # that is run again in the backward pass, where it must add no operation.
            states = states.flatten(0, 1).index_select(0, rows.prompt_end)
        return RowOutputs(logps, rows.response_tokens.float(), states, pooled)

    def generate(
        self, rows: TokenRows, max_new_tokens: int, ends: list[int], pad: int | None, together: bool
    ) -> Tensor:
        """See :func:`~lightning_mlc.models.greedy.generate_greedily`."""
        return generate_greedily(self.causal_lm, rows, max_new_tokens, ends, pad, together)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self._layers()[2]

    def _required_decoder(self) -> nn.Module:
        decoder = self.decoder
        assert decoder is not None, "no shortcut is taken before it was tried"
        return decoder

    def _run(self, module: nn.Module, rows: TokenRows, wanted: Sequence[int] = ()) -> tuple[Any, dict[int, Tensor]]:
        """What ``module``, the LM or its decoder, returns; and the hidden states (R, T, H) of ``wanted`` layers."""
        keywords = attention_arguments(self.causal_lm.config, rows, self.causal_lm.dtype)
        if "position_ids" in self._accepted:
            keywords["position_ids"] = rows.position_ids
        if not wanted or self.shortcuts.hooks:
            with self._capture(wanted) as found:
                output = module(input_ids=rows.input_ids, use_cache=False, **keywords)
            return output, found
        output = module(input_ids=rows.input_ids, use_cache=False, output_hidden_states=True, **keywords)
        return output, {layer: output.hidden_states[layer] for layer in wanted}

    @contextmanager
    def _capture(self, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the hidden states of ``wanted`` layers during the forward pass inside the context."""
        captured: dict[int, Tensor] = {}
        handles = []
        for layer in wanted:

            def keep_input(_module: nn.Module, inputs: Any, keywords: dict[str, Any], layer: int = layer) -> None:
                if layer not in captured:
                    captured[layer] = inputs[0] if inputs else keywords["hidden_states"]

            def keep_output(_module: nn.Module, _inputs: Any, output: Any, layer: int = layer) -> None:
                captured[layer] = output[0]

            if layer == num_layers(self.causal_lm.config):
                # What the decoder returns: after the last layer and the final norm.
                handles.append(self._required_decoder().register_forward_hook(keep_output))
            else:
                # What goes into the next layer: also right where a model scales its embeddings first.
                handles.append(self.layers[layer].register_forward_pre_hook(keep_input, with_kwargs=True))
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _states_only(self, rows: TokenRows, layer: int) -> Tensor:
        """(R, T, H), hidden states of ``layer``, of a pass without logits that ends there if it can."""
        if not self.shortcuts.early_end or layer == num_layers(self.causal_lm.config):
            _, found = self._run(self.decoder or self.model, rows, [layer])
            return found[layer]
        owner, name, layers = self._layers()
        end = _End(layers[layer], self.layer_returns)
        setattr(owner, name, nn.ModuleList([*layers[:layer], end]))
        try:
            self._run(self._required_decoder(), rows)
        finally:
            setattr(owner, name, layers)
        if end.states is None:
            raise RuntimeError("the pass does not come to the layer by way of the list of layers")
        return end.states

    def _layers(self) -> tuple[nn.Module, str, nn.ModuleList]:
        """The decoder's layers, the module that they are an attribute of, and its name."""
        depth, decoder = num_layers(self.causal_lm.config), self.decoder
        found = None if decoder is None else find_layers(decoder, depth)
        if found is None:
            raise UserError(
                "model.name_or_path",
                f"cannot find the {depth} layers of {type(self.causal_lm).__name__}; "
                "leave model.compile at false and trainer.strategy at auto or ddp",
            )
        return found


class _End(nn.Module):
    """Stands in the place of the first layer that need not be run, and keeps what went into it."""

    def __init__(self, layer: nn.Module, returns: int) -> None:
        super().__init__()
        self._replaced = (layer,)  # in a tuple, so as not to become a child
        self._returns = returns
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Some decoders ask a layer for its type before they run it.
        return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, hidden_states: Tensor, *_arguments: Any, **_keywords: Any) -> Any:
        self.states = hidden_states
        if self._returns == 0:
            return hidden_states
        return (hidden_states, *[None] * (self._returns - 1))


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
