"""Check a model after loading: do the fast ways to run it give the same results as the plain way?

The plain way is that of ``transformers``: each sequence alone, without padding, with all layers, all logits and
``output_hidden_states``. The fast ways pack sequences into rows, run the decoder and the head separately, capture
hidden states with hooks, and end passes early. Whether they give the same results depends on the code of each model, so
they are compared: log-probabilities of responses, and hidden states at the ends of prompts, on a few dozen tokens (more
if the model has windows, see :func:`~lightning_mlc.models.trials.trial_length`). A fast way that differs is not used,
and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenSequence
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.attention import LAYER_TYPES, packed_layout_of
from lightning_mlc.models.compiling import uncompiled
from lightning_mlc.models.layers import num_layers, require_one_state
from lightning_mlc.models.logprobs import head_of
from lightning_mlc.models.policy import Policy, Shortcuts
from lightning_mlc.models.trials import LONGEST_TRIAL, difference, tolerance_of, trial_length, trial_rows, windows

logger = logging.getLogger("lightning_mlc")

_CERTAIN = 3.0
"""Factor of the tolerance for results that make a model refused, because rounding may send a token to another
expert."""


@dataclass(frozen=True)
class Checked:
    """The result of a check. If processes share a sharded model, one checks it and the others get its result."""

    layout: Layout
    """How rows are laid out."""
    shortcuts: Shortcuts
    """The shortcuts that give the same results."""
    layer_returns: int
    """See :class:`~lightning_mlc.models.policy.Policy`."""
    width: int
    """Width of the hidden states of the requested layer (the last one by default)."""

    def apply(self, policy: Policy) -> None:
        """Turn on the shortcuts in ``policy``, which must be of the same model."""
        policy.shortcuts, policy.layer_returns = self.shortcuts, self.layer_returns


@torch.no_grad()
def self_check(
    policy: Policy,
    layer: int | None = None,
    longest: int | None = None,
    packing: bool | None = None,
    responses: bool = True,
) -> Checked:
    """Check a model in evaluation mode, and turn on the shortcuts that give the same results.

    Args:
        policy: A model with its weights, on the device it runs on.
        layer: Index of the layer whose hidden states are needed. None: hidden states are not needed.
        longest: Largest number of tokens in a row of the run. None: unknown.
        packing: Whether to pack rows. None: pack them if the results are the same.
        responses: Whether the policy will score responses. If not, its shortcut for them stays off.

    Returns:
        How to lay out rows, and the shortcuts that were turned on.

    Raises:
        UserError: The model cannot be run, its tokens see later tokens, padding changes its results, or ``packing`` is
            True and changes its results.
    """
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        with uncompiled(), restored_hooks(policy.causal_lm):
            trial = _Trial(policy, layer, longest, responses)
            checked = trial.run(packing)
    finally:
        for module in training:
            module.training = True
    checked.apply(policy)
    return checked


class _Plain(NamedTuple):
    """Results of the plain way for one sequence, in float64 on the model's device."""

    logp: Tensor
    """(): log-probability of the response."""
    next: Tensor
    """(V,): logits after the prompt."""
    state: Tensor
    """(H,): hidden state of the requested layer at the end of the prompt."""
    mean: Tensor
    """(H,): mean of the last hidden states over all tokens."""


class _Trial:
    """One check of one model."""

    def __init__(self, policy: Policy, layer: int | None, longest: int | None, responses: bool) -> None:
        self.policy = policy
        self.model = policy.causal_lm
        self.name = type(self.model).__name__
        self.longest = longest
        self.responses = responses
        self.depth = num_layers(self.model.config)
        self.layer = self.depth if layer is None else layer
        # If hidden states are not needed, the model need not return them.
        self.states_matter = layer is not None
        self.rows = trial_rows(self.model.config, trial_length(self.model.config, longest))
        self.returns = 0
        self.embedded: Tensor | None = None
        """Input of the first layer."""
        self.after_first: Tensor | None = None
        """Output of the first layer."""
        self.sample: tuple[Tensor, Tensor] | None = None
        """Last hidden states (1, T, H) and logits (1, T, V) at some tokens of one sequence."""
        self.tolerance = tolerance_of(self.model)
        self.plain = {(row.example, row.language, row.kind): self._alone(row) for row in self.rows}

    # ---- the plain way --------------------------------------------------------------------------------

    def _alone(self, row: TokenSequence) -> _Plain:
        ids = torch.tensor([[*row.prompt, *row.response]], device=self.model.device)
        try:
            with self._watching_first_layer():
                output = self.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        except Exception as error:  # the model's own code
            raise UserError(
                "model.name_or_path",
                f"{self.name} cannot be run on a short text "
                f"({type(error).__name__}: {first_line(error)}); give another model",
            ) from error
        end = len(row.prompt) - 1
        logits, response = output.logits[0, end:-1], ids[0, len(row.prompt) :]
        # In parts, because all of it in float64 would be large.
        parts = zip(torch.split(logits, 256), torch.split(response, 256), strict=True)
        logps = [part.double().log_softmax(-1).gather(1, labels[:, None]).sum() for part, labels in parts]
        states = self._states(output)
        if row.kind == REJECTED:  # the short response
            self.sample = states[-1][:, end:], output.logits[:, end:]
        if self.states_matter:
            require_one_state(states[self.layer], self.layer, self.name)
        logp = torch.stack(logps).sum()
        return _Plain(logp, logits[0].double(), states[self.layer][0, end].double(), states[-1][0].double().mean(0))

    def _states(self, output: Any) -> Sequence[Tensor]:
        states = getattr(output, "hidden_states", None)
        if states is not None and len(states) == self.depth + 1:
            if self.embedded is not None and self.after_first is not None and torch.equal(states[0], self.after_first):
                # Mamba and RWKV leave out the embeddings, and return the last layer's states with and without norm.
                return [self.embedded, *states[:-2], states[-1]]
            return list(states)
        if self.states_matter:
            count = "no" if states is None else str(len(states))
            raise UserError(
                "model.name_or_path",
                f"{self.name} gives {count} hidden states for its {self.depth} layers, "
                "so those that consistency terms need are unknown; give another model",
            )
        return [output.logits] * (self.depth + 1)

    @contextmanager
    def _watching_first_layer(self) -> Iterator[None]:
        """Record the first layer's input and output. The end of a shorter pass must return as many values."""
        try:
            first = self.policy.layers[0]
        except UserError:
            yield
            return

        def note(_module: Any, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
            self.returns = len(output) if isinstance(output, tuple | list) else 0
            self.embedded = inputs[0] if inputs else keywords.get("hidden_states")
            self.after_first = output[0] if isinstance(output, tuple | list) else output

        handle = first.register_forward_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _require_causal(self) -> None:
        """Compare two sequences with the same prompt: their logits after it must not depend on the response.

        Raises:
            UserError: They do, or they are not finite.
        """
        first, second = (self.plain[0, 0, kind].next for kind in (CHOSEN, REJECTED))
        if not (first.isfinite().all() and second.isfinite().all()):
            raise UserError(
                "model.name_or_path",
                f"the logits of {self.name} are not finite: its weights are damaged, or too large for "
                f"{str(self.model.dtype).removeprefix('torch.')}",
            )
        if (share := difference(first, second)) > _CERTAIN * self.tolerance:
            raise UserError(
                "model.name_or_path",
                f"tokens of {self.name} see those after them (the logits after a prompt change with the response by "
                f"{share:.1g} of their size): it is an encoder; give a causal language model",
            )

    # ---- the fast ways --------------------------------------------------------------------------------

    def run(self, packing: bool | None) -> Checked:
        """Try packing and all shortcuts together. If results differ, try them one by one."""
        self._require_causal()
        packed, why_not = self._packed_layout(packing)
        everything = Shortcuts(True, self.responses, True) if self.policy.decoder is not None else Shortcuts()
        if packed is not None and not self._difference(packed, everything):
            return self._checked(packed, everything)
        return self._piece_by_piece(packing, packed, why_not)

    def _packed_layout(self, packing: bool | None) -> tuple[Layout | None, str]:
        """Return how rows would be packed; or None, and the reason why they cannot be packed."""
        if packing is False:
            return None, ""
        implementation = str(self.model.config._attn_implementation)
        layout = packed_layout_of(self.model.config, implementation)
        if layout is None:
            types = set(getattr(self.model.config.get_text_config(), "layer_types", None) or LAYER_TYPES)
            return None, f"attention {implementation}, layers {', '.join(sorted(types))}"
        longest = None if layout.one_row else self.longest
        beyond = [w for w in windows(self.model.config) if w >= LONGEST_TRIAL and (longest is None or w < longest)]
        known = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if any(window != known for window in beyond):
            return None, f"a window of {beyond[0]} tokens is too long for a trial"
        return layout, ""

    def _piece_by_piece(self, packing: bool | None, packed: Layout | None, why_not: str) -> Checked:
        """Try padded rows the plain way. Then add the shortcuts and packing, each if results stay the same.

        Raises:
            UserError: Padding changes results, or ``packing`` is True and changes results.
        """
        layout, shortcuts = Layout(), Shortcuts()
        difference = self._difference(layout, shortcuts, _CERTAIN * self.tolerance)
        if difference and self.policy.decoder is not None:
            shortcuts = Shortcuts(hooks=True)
            difference = self._difference(layout, shortcuts, _CERTAIN * self.tolerance)
        if difference:
            raise UserError(
                "model.name_or_path",
                f"padding changes what {self.name} gives ({difference}), so batches cannot be run; give another model",
            )
        reasons: dict[str, str] = {}
        if self.policy.decoder is not None:
            for name in Shortcuts._fields:
                if name == "two_parts" and not self.responses:
                    continue
                tried = shortcuts._replace(**{name: True})
                if difference := self._difference(layout, tried):
                    reasons[name] = difference
                else:
                    shortcuts = tried
        else:
            reasons = dict.fromkeys(Shortcuts._fields, "no module has its layers")
        if packed is not None:
            why_not = self._difference(packed, shortcuts)
            layout = layout if why_not else packed
        self._warn(reasons, why_not)
        if packing and not layout.packed:
            raise UserError("model.packing", f"{self.name} cannot run packed rows ({why_not}); set it to null or false")
        return self._checked(layout, shortcuts)

    def _warn(self, reasons: Mapping[str, str], why_not_packed: str) -> None:
        consequences = {
            "hooks": "the hidden states of all layers are kept, which takes more memory",
            "two_parts": "the logits of all tokens are computed at once, which takes more memory",
            "early_end": "prompts alone run all layers, which takes more time",
        }
        if why_not_packed:
            logger.warning("%s cannot run packed rows (%s): rows are padded", self.name, why_not_packed)
        for name, reason in reasons.items():
            logger.warning("%s is run the plain way (%s): %s", self.name, reason, consequences[name])

    def _checked(self, layout: Layout, shortcuts: Shortcuts) -> Checked:
        width = int(next(iter(self.plain.values())).state.shape[-1])
        return Checked(layout, shortcuts, self.returns, width)

    def _difference(self, layout: Layout, shortcuts: Shortcuts, tolerance: float | None = None) -> str:
        """Describe how ``layout`` with ``shortcuts`` differs from the plain way. Empty: it does not differ."""
        self.policy.shortcuts, self.policy.layer_returns = shortcuts, self.returns
        prompts = [
            TokenSequence(row.prompt, (), row.example, row.language, NO_RESPONSE) for row in self.rows if row.leads
        ]
        try:
            answers = layout.blocks(self.rows, 0)
            alone = layout.blocks(prompts, 0) if self.states_matter else ()
            worst = {"log-probabilities": 0.0, "hidden states": 0.0, "logits": 0.0}
            if shortcuts.two_parts:
                self._compare_head(worst)
            for block in (*answers, *alone):
                block = block.to(self.model.device)
                wanted = self.layer if self.states_matter else None
                found = self.policy(block, wanted, pool=self.states_matter and block.longest_response > 0)
                for index, place in enumerate(_places(block)):
                    expected = self._expected(place)
                    if block.longest_response:
                        _note(worst, "log-probabilities", found.logps[index], expected.logp)
                    if found.states is not None:
                        _note(worst, "hidden states", found.states[index], expected.state)
                    if found.pooled is not None:
                        _note(worst, "hidden states", found.pooled[index], expected.mean)
        except Exception as error:  # the model's own code may fail in any way with a mask or a missing part
            return f"{type(error).__name__}: {first_line(error)}"[:160]
        finally:
            self.policy.shortcuts = Shortcuts()
        name, difference = max(worst.items(), key=lambda item: item[1])
        return f"{name} differ by {difference:.1g} of their size" if difference > (tolerance or self.tolerance) else ""

    def _compare_head(self, worst: dict[str, float]) -> None:
        name = self.policy.decoder_name
        assert name is not None
        assert self.sample is not None
        states, logits = self.sample
        found = head_of(self.model, name)(inputs_embeds=states, use_cache=False).logits
        _note(worst, "logits", found, logits.double())

    def _expected(self, place: tuple[int, int, int]) -> _Plain:
        example, language, kind = place
        return self.plain[example, language, CHOSEN if kind == NO_RESPONSE else kind]


def _places(block: Any) -> list[tuple[int, int, int]]:
    return list(zip(block.example.tolist(), block.language.tolist(), block.kind.tolist(), strict=True))


def _note(worst: dict[str, float], name: str, found: Tensor, expected: Tensor) -> None:
    worst[name] = max(worst[name], difference(found, expected))


@contextmanager
def restored_hooks(model: PreTrainedModel) -> Iterator[None]:
    """Remove at the end the hooks that ``output_hidden_states`` leaves in a model. They slow down a compiled model."""
    flag = "_output_capturing_hooks_installed"
    before = [(module, module._forward_hooks.copy(), flag in module.__dict__) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, installed in before:
            for key in module._forward_hooks.keys() - hooks.keys():
                del module._forward_hooks[key]
            if not installed:
                module.__dict__.pop(flag, None)
