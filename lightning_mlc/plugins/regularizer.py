"""The MLC loss on a stream of prompts of its own, for any training loop."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, distributed, nn
from transformers import PreTrainedTokenizerBase

from lightning_mlc.consistency import Observed, Representation
from lightning_mlc.consistency.collapse import CollapseWatch, sums_of_step
from lightning_mlc.errors import UserError, first_line, renamed
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.models.forward import Grid
from lightning_mlc.plugins.logged_means import LoggedMeans
from lightning_mlc.plugins.prompts import PromptGroups, prompts_of_step, share_of
from lightning_mlc.plugins.settings import settings_of
from lightning_mlc.plugins.states import PromptStates, require_embeddings, transformers_model

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("lightning_mlc")

STATE_FILE = "mlc.safetensors"
"""Name of the file in a checkpoint that holds the extractor and the running mean."""
_FIXED = ("extractor", "extractor_dim", "layer", "center", "seed", "prompts_per_step", "prompts", "languages")
"""Options that a resumed run has to keep. Others may change, as a learning rate may, and are told."""


class MLCRegularizer(nn.Module):
    """The multi-lingual consistency loss (arXiv 2602.16660) of prompts that are independent of a trainer's batches.

    Which prompts a step uses follows from the seed and from the number of the step. So nothing travels through the
    trainer's data, and nothing has to be saved to resume (except a trained extractor or a running mean, see
    :meth:`save`). In a loop of plain PyTorch::

        mlc = MLCRegularizer("prompts.jsonl", tokenizer, weight=0.8, prompts_per_step=8)
        for step, batch in enumerate(batches):
            mlc.loss(model, step).backward()  # its own backward pass first: one graph in memory at a time
            objective(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        prompts: A file in any layout that training reads, a ``datasets.Dataset`` with columns ``prompt_en``,
            ``prompt_sw``, ... or ``prompt`` and ``translations``, or a list of rows such as
            ``[{"en": "...", "sw": "..."}]``.
        tokenizer: The model's tokenizer, with a chat template.
        languages: BCP-47 codes of the languages to use. None: all that the prompts have.
        source_language: BCP-47 code of the column ``prompt``.
        weight: Factor of the loss. 0 turns it off.
        temperature: Temperature of the softmax over the singular values, from 0.01 to 100.
        scale: ``top`` divides the singular values by the largest one, as the authors' code does; ``none`` does not.
        layer: The layer whose hidden states are compared: an integer index (0: the embeddings, -1: after the last
            layer and the final norm) or a fraction of the depth (0.5: the middle).
        extractor: ``frozen`` compares a fixed random map of the hidden states, ``linear`` trains this map (its
            parameters are those of this module), ``none`` compares the hidden states themselves.
        extractor_dim: Output width of the extractor, at least 2.
        every_n_steps: Add the loss on every n-th optimizer step. The other steps run no translations.
        prompts_per_step: Number of prompts of an optimizer step, of all processes and micro-batches together. Each
            is run in all of its languages.
        max_prompt_length: Longest prompt in tokens, the chat template included. A longer one is cut.
        center: Whether to subtract a running mean of the hidden states.
        seed: Seed of the extractor and of the order of the prompts.

    Raises:
        UserError: An option is out of range, the tokenizer has no chat template, or the prompts cannot be used.
    """

    def __init__(
        self,
        prompts: str | Path | Dataset | Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        languages: Sequence[str] | None = None,
        source_language: str = "en",
        weight: float = 0.8,
        temperature: float = 0.2,
        scale: Literal["top", "none"] = "top",
        layer: int | float = -1,
        extractor: Literal["frozen", "linear", "none"] = "frozen",
        extractor_dim: int = 512,
        every_n_steps: int = 1,
        prompts_per_step: int = 8,
        max_prompt_length: int = 512,
        center: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.settings = settings_of(
            weight=weight,
            temperature=temperature,
            scale=scale,
            layer=layer,
            extractor=extractor,
            extractor_dim=extractor_dim,
            every_n_steps=every_n_steps,
            prompts_per_step=prompts_per_step,
            max_prompt_length=max_prompt_length,
            center=center,
            seed=seed,
        )
        if not hasattr(tokenizer, "chat_template"):
            raise UserError("tokenizer", f"must be a tokenizer with a chat template, got {type(tokenizer).__name__}")
        self.groups = PromptGroups(prompts, tokenizer, languages, source_language, max_prompt_length)
        if self.groups.left_out:
            logger.warning(
                "%d of %d prompts exist in one language only: MLC leaves them out",
                self.groups.left_out,
                self.groups.left_out + len(self.groups),
            )
        if prompts_per_step > len(self.groups):
            logger.warning(
                "MLC has only %d prompts, so a step uses all of them instead of %d", len(self.groups), prompts_per_step
            )
        self.prompts_per_step = min(prompts_per_step, len(self.groups))
        self.seed = seed
        self._longest_allowed = max_prompt_length
        self.representation: Representation | None = None
        """The extractor and the running mean, once the model is known."""
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._states: tuple[nn.Module, PromptStates] | None = None
        """The model, and how it is run. In a tuple, so that it is no part of this module."""
        self._means = LoggedMeans()
        self._collapse_watch = CollapseWatch("lower weight, or train on ordinary prompts, too (docs/consistency.md)")

    @property
    def weight(self) -> float:
        """Factor of the loss."""
        return self.settings.mlc.weight

    def runs_at(self, step: int) -> bool:
        """Whether optimizer step ``step`` (counted from 0) has the loss."""
        return bool(self.settings.terms_at(step))

    def prepare(self, model: nn.Module) -> None:
        """Make the extractor for ``model``. :meth:`loss` does so by itself, but an optimizer needs it before.

        Args:
            model: The model, wrapped or not. All of its processes make the same extractor.

        Raises:
            UserError: It is no causal LM of transformers, or has too few embeddings or positions for the prompts.
        """
        if self.representation is not None:
            return
        require_embeddings(model, self.groups.longest, self.groups.highest_token)
        width = int(transformers_model(model).config.get_text_config().hidden_size)
        with torch.random.fork_rng(devices=[]):  # on the CPU, so that every device gets the same map
            torch.manual_seed(self.seed)
            representation = Representation(self.settings, width)
        self.representation = representation.to(next(model.parameters()).device)

    def loss(
        self,
        model: nn.Module,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int = 0,
        micro_batches: int = 1,
        detailed: bool = True,
    ) -> Tensor:
        """Compute the loss of this micro-batch's share of the step's prompts.

        Average it over the micro-batches and processes, as you do with an objective's mean. The result is ``weight``
        times the mean over the prompts of the step, however they are divided.

        Args:
            model: The model as your loop calls it, wrapped or not.
            step: Number of the optimizer step, from 0.
            rank: Number of this process, from 0.
            world_size: Number of processes that have different data.
            micro_batch: Number of this micro-batch of the step, from 0.
            micro_batches: Number of micro-batches of the step on each process.
            detailed: Whether :meth:`metrics` gets collinearity, too. It takes an eigen-solver in float64.

        Returns:
            (): float32. It is 0 and reaches no weight of the model if the step has no loss, or this micro-batch no
            prompt.

        Raises:
            UserError: A number is out of range, the model cannot be run on prompts or has no such layer, or no weight
                that is trained has an influence on the layer (not under ``torch.no_grad()``).
        """
        _require_below("rank", rank, "world_size", world_size)
        _require_below("micro_batch", micro_batch, "micro_batches", micro_batches)
        self.prepare(model)
        assert self.representation is not None
        device = next(model.parameters()).device
        representation = self.representation.to(device)
        nothing = torch.zeros((), device=device, requires_grad=True)  # so that .backward() works on every step
        if not self.runs_at(step):
            return nothing
        parts = world_size * micro_batches
        every = prompts_of_step(len(self.groups), self.prompts_per_step, self.seed, step)
        share = share_of(every, micro_batch * world_size + rank, parts)
        runner = self._runner(model)
        if micro_batch == 0:
            representation.forget_window()  # what an interrupted step has left
        # A trained extractor has a gradient on every process, because all of them average it.
        total = sum((0.0 * parameter.sum() for parameter in self._trained()), start=nothing)
        if share or runner.needs_rows:
            prompts = self.groups.sequences(share or every[:1])
            states, present = runner(model, prompts, len(self.groups.languages))
            if torch.is_grad_enabled() and not states.requires_grad:
                raise UserError(
                    "layer",
                    f"no weight that is trained has an influence on layer {self.settings.layer}, so the loss would "
                    "change nothing; take a later layer, or train earlier weights",
                )
            losses, observed = self._losses(representation, states, present)
            # A process without a prompt of its own runs one for the others' sake, and counts it as 0.
            total = total + self.weight * losses.sum() * (parts / len(every) if share else 0.0)
            if share:
                self._note(losses, observed, detailed)
                representation.observe(states.detach(), present)
        if micro_batch == micro_batches - 1:
            representation.fold_mean()
            self._means.end_step()
        return total

    def average_gradients(self) -> None:
        """Average the gradients of a trained extractor over the processes, as DDP does for those of the model.

        Call it on every process, after the last backward pass of a step and before the optimizer's step. It does
        nothing if the extractor is not trained, the step has no loss, or there is one process.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        for parameter in self._trained():
            if parameter.grad is not None:  # the same on all processes
                distributed.all_reduce(parameter.grad)
                parameter.grad /= distributed.get_world_size()

    def metrics(self, synchronize: bool = False) -> dict[str, float]:
        """Return the means since the last call, and forget them.

        Args:
            synchronize: Average over all processes, each of which has to call this.

        Returns:
            ``mlc/loss`` (without the weight), ``mlc/excess`` (the loss minus its smallest possible value),
            ``mlc/explained_variance``, ``mlc/min_cosine`` and ``mlc/between_prompts`` (the mean cosine between
            different prompts in one language, of the prompts that one process has in one step) after the extractor, and
            the last three of the hidden states themselves as ``mlc/raw/...``. Empty if no step had the loss. Without
            ``between_prompts`` if no process had two prompts.
        """
        means = self._means.take(synchronize)
        self._collapse_watch.look(means)
        return means

    def save(self, folder: str | Path) -> None:
        """Write the extractor and the running mean to ``folder``, as ``mlc.safetensors``. Makes the folder."""
        if self.representation is None:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / STATE_FILE, save(tensors, metadata={"mlc": json.dumps(self.identity())}))

    def restore(self, folder: str | Path, model: nn.Module) -> None:
        """Read what :meth:`save` wrote.

        Args:
            folder: The folder of a checkpoint.
            model: The model, before or after it is wrapped.

        Raises:
            UserError: The file is damaged, or was written with other options.
        """
        self.prepare(model)
        path = Path(folder) / STATE_FILE
        if not path.exists():
            if self._trained():
                raise UserError(
                    str(folder), f"has no {STATE_FILE}, so no trained extractor; use extractor 'frozen', or start anew"
                )
            logger.warning("%s has no %s: the MLC loss begins here", folder, STATE_FILE)
            return
        try:
            with safe_open(path, "pt") as file:
                stored = json.loads((file.metadata() or {}).get("mlc", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                str(path), f"cannot be read ({first_line(error)}); resume from another checkpoint"
            ) from error
        self.require_same(stored, str(folder))
        self.load_state_dict(tensors)

    def identity(self) -> dict[str, Any]:
        """The options, for a checkpoint. A resumed run must not change most of them."""
        settings = self.settings
        return {
            "extractor": settings.extractor,
            "extractor_dim": settings.extractor_dim,
            "layer": settings.layer,
            "center": settings.center,
            "seed": self.seed,
            "prompts_per_step": self.prompts_per_step,
            "prompts": len(self.groups),
            "languages": list(self.groups.languages),
            "weight": settings.mlc.weight,
            "temperature": settings.mlc.temperature,
            "scale": settings.mlc.scale,
            "every_n_steps": settings.every_n_steps,
            "max_prompt_length": self._longest_allowed,
        }

    def require_same(self, stored: Mapping[str, Any], where: str) -> None:
        """Refuse to resume with other options, and warn of those that may change.

        Args:
            stored: What :meth:`identity` returned when the checkpoint was written.
            where: The checkpoint, for the error.

        Raises:
            UserError: An option has another value now, or there is another number of prompts.
        """
        changed = {name: value for name, value in self.identity().items() if stored.get(name) != value}
        for name, value in changed.items():
            if name in _FIXED:
                raise UserError(
                    name, f"is {value}, but was {stored.get(name)} in {where}; give the same, or start a new run"
                )
            logger.warning("MLC: %s is %s, but was %s in %s", name, value, stored.get(name), where)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _runner(self, model: nn.Module) -> PromptStates:
        if self._states is None or self._states[0] is not model:
            assert not isinstance(self.settings.layer, str), "settings_of refuses auto"
            with renamed(("model.name_or_path",), "model"):
                runner = PromptStates(model, self.settings.layer, self.groups.longest, self._pad_id)
            self._states = (model, runner)
        return self._states[1]

    def _losses(self, representation: Representation, states: Tensor, present: Tensor) -> tuple[Tensor, Observed]:
        nothing = torch.zeros(*present.shape, 3, device=states.device)
        grid = Grid(nothing, nothing, states, present)
        observed = Observed(grid, None, representation.extract(states), 0)
        return self.settings.mlc.losses(observed), observed

    def _note(self, losses: Tensor, observed: Observed, detailed: bool) -> None:
        values = {"loss": losses.detach()}
        if detailed:
            values |= self.settings.mlc.metrics(observed)
            self._means.add_prompts(sums_of_step(observed))
        self._means.add({f"mlc/{name}": value for name, value in values.items()})


def _require_below(option: str, value: int, bound: str, count: int) -> None:
    if not 0 <= value < count:
        raise UserError(option, f"must be from 0 to {bound} - 1, which is {count - 1}, got {value}")


OPTIONS = {
    name: argument.default
    for name, argument in inspect.signature(MLCRegularizer).parameters.items()
    if argument.kind is argument.KEYWORD_ONLY
}
"""The options of the regularizer and their defaults, so that no option is listed twice."""
