"""The LightningModule: an alignment objective on the source language, plus consistency terms.

One step, from top to bottom: run the batch (:mod:`lightning_mlc.models.forward`), score it with the reference,
sum the objective's losses and the consistency terms', divide each by the optimizer step's total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torchmetrics
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.consistency import Consistency, ConsistencyTerm, Needs, Observed, Representation
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.records import DataKind
from lightning_mlc.data.rows import CHOSEN, REJECTED
from lightning_mlc.data.turns import end_tokens
from lightning_mlc.distributed import tensor_parallel
from lightning_mlc.distributed.sharding import FSDP2, require_supported
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.lightning_internals import ends_window
from lightning_mlc.metrics import Collinearity, ExampleMean, LanguageCosines, LanguageMean, language_differences
from lightning_mlc.models.compiling import require_compiler
from lightning_mlc.models.forward import Grid, run_batch
from lightning_mlc.models.loading import dtype_of, frozen_dtype_of, load_causal_lm
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.parts import beyond_text, num_layers, submodule
from lightning_mlc.models.policy import Policy, resolve_layer
from lightning_mlc.models.quantization import require_quantizable, require_whole
from lightning_mlc.models.requirements import require_fitting
from lightning_mlc.models.self_check import Checked, self_check
from lightning_mlc.objectives import Objective, Responses, Scores
from lightning_mlc.processes import require_same
from lightning_mlc.reference import (
    OnlineReference,
    PrecomputedReference,
    ReferenceSettings,
    describe_model,
    precompute,
)
from lightning_mlc.sources import ModelSource, load_config, load_tokenizer
from lightning_mlc.training.recipe import describe_run
from lightning_mlc.training.schedules import Warmup, by_step

PROGRESS = {"loss": "loss", "mlc/loss": "mlc", "rewards/accuracies": "acc"}
"""What the progress bar shows, and the short names it has room for."""


def default_optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW at a rate that suits preference learning on a whole model."""
    return torch.optim.AdamW(parameters, lr=5e-7, weight_decay=0.0)


class AlignmentModule(LightningModule):
    """Aligns a Hugging Face causal LM in one language and keeps it consistent in the others.

    Args:
        name_or_path: Model folder, hub id, ``.gguf`` file, or ``package:NAME`` for a model inside an
            installed Python package.
        objective: What is learned from the responses in the source language; null trains on ``consistency`` alone.
        consistency: What keeps the languages together.
        reference: The model that objectives such as DPO measure the policy against.
        optimizer: Optimizer of the trainable parameters.
        scheduler: Learning-rate schedule, stepped once per optimizer step; null keeps the rate constant.
        lora: Train low-rank adapters instead of the weights; null trains the weights.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        activation_offload: Keep in CPU memory what gradient checkpointing keeps for the backward pass (the
            input of each layer). On a GPU only.
        compile: Compile the decoder layers with ``torch.compile``: a slow first step, faster ones afterwards.
        gguf_file: Name of a GGUF file inside the model folder or repository.
        revision: Revision of a hub model.
        trust_remote_code: Run Python code that the model repository carries. Only for repositories you trust.
        attn_implementation: Attention implementation of transformers; null takes its default.
        packing: Run several sequences in a row instead of padding each, and a prompt once for all its responses.
            Null does so wherever the model gives the same results.
        max_new_tokens: Longest response that ``predict`` generates, in tokens.
    """

    policy: Policy | None
    representation: Representation | None

    def __init__(
        self,
        name_or_path: str,
        objective: Objective | None,
        consistency: Consistency = Consistency(),  # noqa: B008 (frozen)
        reference: ReferenceSettings = ReferenceSettings(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        compile: bool = False,
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        packing: bool | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise UserError("model.max_new_tokens", f"must be at least 1, got {max_new_tokens}")
        if activation_offload and not gradient_checkpointing:
            raise UserError(
                "model.activation_offload",
                "offloads what gradient checkpointing keeps; set model.gradient_checkpointing to true",
            )
        if compile and activation_offload:
            raise UserError(
                "model.compile",
                "layers that offload their activations cannot be compiled; "
                "set model.activation_offload or model.compile to false",
            )
        if compile and lora is not None and lora.quantize == "int8":
            raise UserError(
                "model.compile",
                "int8 products cannot be compiled under gradient checkpointing; "
                "set model.lora.quantize to nf4, or model.compile to false",
            )
        if objective is None and not consistency.terms:
            raise UserError(
                "model.objective", "is null, and no term of model.consistency is on: there is nothing to train"
            )
        if objective is None and consistency.every_n_steps > 1:
            raise UserError(
                "model.consistency.every_n_steps",
                "the steps between would train nothing, for model.objective is null; set it to 1, or give an objective",
            )
        self.source = ModelSource(name_or_path, gguf_file, revision, trust_remote_code)
        self.objective = objective
        self.consistency = consistency
        self.reference = reference
        self.optimizer_callable = optimizer
        self.scheduler_callable = scheduler
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.activation_offload = activation_offload
        self.compiles = compile  # `compile` is a method of any module
        self.attn_implementation = attn_implementation
        self.packing = packing
        self.max_new_tokens = max_new_tokens
        self.policy = None
        self.representation = None
        self.languages: tuple[str, ...] = ()
        """Languages of the data, the source language first."""
        self.validation_results: dict[str, float] = {}
        """Metrics of the latest validation, by logged name."""
        self.validation_cosines: list[list[float]] = []
        """Mean cosines between languages of the raw hidden states in the latest validation."""
        self._reference: OnlineReference | PrecomputedReference | None = None
        self._initial: dict[str, str] = {}
        """What the scores of the initial model depend on, where they are precomputed."""
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._ends: list[int] = []
        """Ids that end a response, found with the tokenizer."""
        self._layer: int | None = None
        self._checked: Checked | None = None
        """How the model is to be run, once it has been tried."""
        self._window: dict[str, Tensor] = {}
        self._latest_consistency: dict[str, Tensor] = {}
        self._metrics: nn.ModuleDict = nn.ModuleDict()

    # ---- set-up -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what cannot work together, before the model is loaded."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        precision = str(self.trainer.precision)
        dtype_of(precision)
        require_same("trainer.precision", precision)
        device = self.trainer.strategy.root_device
        require_supported(self.trainer.strategy)
        if self._sharding is not None:
            self._require_shardable(self._sharding)
        if self.activation_offload and device.type == "cpu":
            raise UserError(
                "model.activation_offload",
                "the model is on the CPU, and its activations with it; set model.activation_offload to false",
            )
        self.reference.check(self.objective, self.consistency.needs, adapters=self.lora is not None)
        if stage != "predict":
            if self.objective is not None:
                self.objective.check_data(data.kind)
            if self._needs_mismatched:
                data.check_mismatches()
            self.consistency.require_pairs(data.kind == "pairs")
            self.choose_rows(data)
        if stage == "fit":
            self.consistency.require_languages(data.languages)
            self._require_gradients_everywhere()
            data.plan_steps(translations=bool(self.consistency.terms))
        if self.policy is None:
            config = load_config(self.source)
            if self.lora is not None and self.lora.quantize is not None:
                require_quantizable(self.source, config, precision)
            elif self.lora is None and stage == "fit":
                require_whole(self.source, config)
            if self._sharding is not None:
                self._sharding.require_splittable(config)
            self._layer = resolve_layer(self.consistency.layer, num_layers(config))
            longest = data.longest_sequence()
            require_fitting(self.source, config, self.lora, self.attn_implementation, data.highest_token(), longest)
            if self.compiles and stage != "predict":
                require_compiler(device)
        self.languages = data.languages
        if stage != "predict":
            self._metrics = self._make_metrics(self.languages, data.kind)

    def _require_shardable(self, sharding: FSDP2) -> None:
        """Refuse what a model that is shared out over processes cannot do, or is not known to."""
        if self.lora is not None and self.lora.quantize is not None:
            raise UserError(
                "model.lora.quantize",
                "a quantised model cannot be shared out over processes; set it to null, or trainer.strategy to ddp",
            )
        if self.compiles:
            raise UserError(
                "model.compile",
                "not with a model that is shared out over processes; set it to false, or trainer.strategy to ddp",
            )
        if self.lora is not None and sharding.tensor_parallel_size > 1:
            raise UserError(
                tensor_parallel.OPTION, "layers with adapters cannot be split; set it to 1, or model.lora to null"
            )

    def choose_rows(self, data: Any) -> None:
        """Tell ``data``, a :class:`~lightning_mlc.data.MultilingualData`, which rows training runs."""
        data.with_rejected = self._needs_rejected
        data.with_mismatched = self._needs_mismatched
        in_all, in_source = self.consistency.needs.responses, self.objective is not None
        data.responses_in = "all" if in_all else "source" if in_source else "none"

    def _require_gradients_everywhere(self) -> None:
        """Refuse what DDP would stumble over in its second step."""
        strategy = self.trainer.strategy
        if self.objective is not None or self.consistency.needs.responses or not isinstance(strategy, DDPStrategy):
            return
        if not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise UserError(
                "trainer.strategy",
                "hidden states alone give the head no gradient, and model.objective is null; "
                "set it to ddp_find_unused_parameters_true",
            )

    def configure_model(self) -> None:
        loaded_now = self.policy is None
        if self.policy is None:
            self.policy = self._load_policy()
            checked = self._checked = self._check(self.policy)
            self.trainer.datamodule.layout = checked.layout  # type: ignore[attr-defined]
            if self.consistency.needs.representations:
                self.representation = Representation(self.consistency, checked.width)
        if self._needs_reference(self.consistency.needs) and not self.trainer.predicting:
            # Without adapters only a model just loaded is the initial one; it may have been trained since.
            self._set_up_reference(self.policy if loaded_now or self.lora is not None else None)
        if loaded_now and self._sharding is not None:
            self._shard(self._sharding)

    def _set_up_reference(self, initial: Policy | None) -> None:
        """The reference, of the ``initial`` model if it is at hand: now, before a checkpoint takes its place."""
        if self.reference.mode == "precomputed":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]

            def load() -> Policy:
                policy = initial or self._load_policy()
                return policy if self._sharding is None else self._sharding.shard(policy, precision)

            precision = str(self.trainer.precision)
            translations = self.consistency.needs.reference_translations
            self._reference = precompute(self.trainer, data, load, self._initial, str(self.source), translations)
        elif self._reference is None:
            self._reference = OnlineReference(initial or self._load_policy())

    @property
    def _sharding(self) -> FSDP2 | None:
        """The strategy, if it shares the model out over processes."""
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, FSDP2) else None

    def _shard(self, sharding: FSDP2) -> None:
        for policy in self.policies():
            sharding.shard(policy, str(self.trainer.precision))
        if self.representation is not None:
            sharding.shard_methods(self.representation, "extract")

    @property
    def _needs_rejected(self) -> bool:
        return self.consistency.needs.responses or (self.objective is not None and self.objective.needs_rejected)

    @property
    def keeps_reference(self) -> bool:
        """Whether a model of its own is in memory to measure the policy against."""
        return self._needs_reference(self.consistency.needs) and self.reference.mode == "online" and self.lora is None

    @property
    def _needs_mismatched(self) -> bool:
        return self.objective is not None and self.objective.needs_mismatched

    @property
    def uses_reference(self) -> bool:
        """Whether the policy is measured against a reference at all."""
        return self._needs_reference(self.consistency.needs)

    def _needs_reference(self, needs: Needs) -> bool:
        return needs.reference or (self.objective is not None and self.objective.needs_reference)

    def _check(self, policy: Policy) -> Checked:
        """Try the model just loaded; what it does right is set in ``policy``."""
        longest = self.trainer.datamodule.longest_row()  # type: ignore[attr-defined]
        if self._sharding is None:
            # Lightning moves it there in a moment. Some kinds of attention, and most models, need the device.
            policy.to(self.trainer.strategy.root_device)
            return self_check(policy, self._layer, longest, self.packing)
        # Only process 0 has weights to try things with, and all must run the same passes.
        checked = self_check(policy, self._layer, longest, self.packing) if self.trainer.is_global_zero else None
        checked = self._sharding.broadcast(checked)
        assert checked is not None
        checked = replace(checked, layout=replace(checked.layout, few_passes=True))
        checked.apply(policy)
        return checked

    def _load_policy(self) -> Policy:
        model: Any
        precision = str(self.trainer.precision)
        # Of a model to be shared out, process 0 reads the weights for all.
        weights = self._sharding is None or self.trainer.is_global_zero
        if self.lora is None:
            model = load_causal_lm(self.source, dtype_of(precision), self.attn_implementation, weights)
        else:
            device = self.trainer.strategy.root_device
            dtype = frozen_dtype_of(precision)
            model = self.lora.load_base(self.source, dtype, device, self.attn_implementation, weights)
        if self.reference.mode == "precomputed" and not self._initial and not self.trainer.predicting:
            self._initial = describe_model(model, precision) if self.trainer.is_global_zero else {}
        policy = self.build_policy(model, self.activation_offload)
        if self._checked is not None:  # a second copy of the model, as reference
            self._checked.apply(policy)
        if self.compiles and not self.trainer.predicting:  # generation calls the layers in other ways
            policy.compile_layers()
        return policy

    def build_policy(self, model: Any, offload: bool = False) -> Policy:
        """``model`` as it is trained: with adapters, if any, and gradient checkpointing (``offload`` what it keeps)."""
        if self.lora is not None:
            model = add_lora(model, self.lora)
        else:
            for name in beyond_text(model):  # where there are no gradients, which DDP would wait for
                submodule(model, name).requires_grad_(False)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, offload=offload)
            if self.lora is not None:
                model.enable_input_require_grads()
        # transformers returns models in eval mode, where dropout and gradient checkpointing do nothing.
        return Policy(model).train()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.policy is not None
        groups: list[dict[str, Any]] = [{"params": [p for p in self.policy.parameters() if p.requires_grad]}]
        if self.representation is not None:
            extractor = [p for p in self.representation.parameters() if p.requires_grad]
            if extractor:
                rate = {} if self.consistency.extractor_lr is None else {"lr": self.consistency.extractor_lr}
                groups.append({"params": extractor, **rate})
        with _told_of("model.optimizer"):
            optimizer = self.optimizer_callable(groups)
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise UserError("model.optimizer", "SparseAdam takes sparse gradients alone; take Adam")
        mixed = str(self.trainer.precision).endswith("-mixed")
        if optimizer.defaults.get("fused") and mixed and self.trainer.gradient_clip_val:
            raise UserError(
                "model.optimizer.fused",
                "Lightning cannot clip gradients of a fused optimizer in mixed precision; "
                "set fused to false, or trainer.gradient_clip_val to null",
            )
        if self.scheduler_callable is None:
            return optimizer
        with _told_of("model.scheduler"):
            scheduler = by_step(self.scheduler_callable(optimizer))
        if isinstance(scheduler, Warmup):
            scheduler.set_total_steps(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        with _told_of("model.scheduler"):  # some have an end, which is not the run's
            super().lr_scheduler_step(scheduler, metric)

    # ---- training -----------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leave the translations behind on steps that do not run them."""
        if self.trainer.training and not self.consistency.terms_at(self.trainer.global_step):
            batch = batch.without_translations()
        return batch if self._sharding is None else self._sharding.with_equal_passes(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.policy is not None
        terms = self.consistency.terms_at(self.trainer.global_step)
        needs = Needs.of(terms)
        layer = self._layer if needs.representations else None
        reference = None
        if self._reference is not None and self._needs_reference(needs):
            with self._span("reference forward"):  # first, for after it the policy's activations take up memory
                reference = self._reference.grid(batch, "train", needs.reference_translations, needs.pooled_states)
        grid = run_batch(self.policy, batch, layer, needs.pooled_states, self._span)
        with self._span("objective"):
            loss, metrics = self._objective_terms(batch, grid, reference)
        if terms:
            with self._span("consistency loss"):
                consistency_loss, consistency_metrics = self._consistency_terms(batch, grid, reference, terms)
            loss = loss + consistency_loss
            metrics |= consistency_metrics
        elif self.representation is not None and self._sharding is None:
            # DDP expects every trainable parameter in every backward pass; the zero gradient is
            # dropped again in `on_before_optimizer_step`.
            loss = loss + sum(p.sum() for p in self.representation.parameters() if p.requires_grad) * 0.0
        if not torch.isfinite(loss):
            raise UserError(
                None,
                f"the loss is {loss.item()} at step {self.trainer.global_step} (batch of {', '.join(batch.ids)}); "
                "lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at those rows",
            )
        self._accumulate({"loss": loss, **metrics})
        if ends_window(self.trainer, batch_idx):
            self._log_window()
        return loss

    def _span(self, name: str) -> AbstractContextManager[Any]:
        """Shows what runs inside to ``--trainer.profiler``, under ``name``."""
        profiler: Profiler = self.trainer.profiler  # type: ignore[attr-defined]
        return profiler.profile(f"[Step]{name}")

    def policies(self) -> list[Policy]:
        """What a step runs batches through: the policy, then the reference where it is a model of its own."""
        assert self.policy is not None
        reference = [self._reference.policy] if isinstance(self._reference, OnlineReference) else []
        return [self.policy, *(policy for policy in reference if policy is not self.policy)]

    def _objective_terms(self, batch: Batch, grid: Grid, reference: Grid | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss = torch.zeros((), device=batch.keys.device)
        if not batch.responses:
            return loss, {}
        responses = self._responses(grid, reference, batch.source)
        totals = batch.normalizers
        metrics: dict[str, Tensor] = {}
        if self.objective is not None:
            # A step may be without desirable responses, or without undesirable ones: their sums are 0.
            total = {
                "examples": totals.examples,
                "responses": totals.responses,
                "tokens": totals.response_tokens or 1.0,
            }
            terms = self.objective.terms(responses)
            loss = torch.stack([term.losses.sum() / total[term.mean_over] for term in terms]).sum()
            metrics["objective/loss"] = loss
            for name, values in self.objective.metrics(responses).items():
                metrics[name] = values.sum() / totals.examples
        for name, scores, count in (
            ("chosen", responses.chosen, totals.chosen),
            ("rejected", responses.rejected, totals.rejected),
        ):
            if scores is None or count == 0:  # of the whole step, and so on all processes
                continue
            metrics[f"logps/{name}"] = scores.logps.sum() / count
            if self._needs_rejected:
                metrics[f"rewards/{name}"] = (self._rewards(scores) * scores.present).sum() / count
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
            if totals.chosen == totals.rejected == totals.examples:
                chosen, rejected = responses.pairs
                margins = self._rewards(chosen) - self._rewards(rejected)
                metrics["rewards/accuracies"] = wins(margins).sum() / totals.examples
        return loss, metrics

    def _responses(self, grid: Grid, reference: Grid | None, language: int) -> Responses:
        """Scores (B,) of all that the objective and the consistency terms look at, in one language."""
        return grid.responses(reference, language, self._needs_rejected, self._needs_mismatched)

    def _rewards(self, scores: Scores) -> Tensor:
        """The objective's rewards; without any, how likely the policy holds a response to be, per token."""
        rewards = None if self.objective is None else self.objective.rewards(scores)
        return scores.mean_logps if rewards is None else rewards

    def _consistency_terms(
        self, batch: Batch, grid: Grid, reference: Grid | None, terms: Sequence[ConsistencyTerm]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # No group in the whole optimizer step: every loss below is 0, and so is their sum.
        groups = batch.normalizers.groups or 1.0
        if self.representation is not None and grid.states is not None:
            self.representation.observe(grid.states, grid.present)
        observed = self._observed(batch, grid, reference)
        metrics = {f"{term.name}/loss": term.losses(observed).sum() / groups for term in terms}
        loss = torch.stack([term.weight * metrics[f"{term.name}/loss"] for term in terms]).sum()
        if self._logs_this_step():
            # Collinearity whichever term the representations are for, so that terms can be compared.
            compared = () if observed.representations is None else (self.consistency.mlc,)
            for term in dict.fromkeys((*terms, *compared)):
                for name, values in term.metrics(observed).items():
                    metrics[f"{term.name}/{name}"] = values.sum() / groups
        return loss, metrics

    def _observed(self, batch: Batch, grid: Grid, reference: Grid | None) -> Observed:
        representations = None
        if self.representation is not None and grid.states is not None:
            representations = self.representation.extract(grid.states)
        return Observed(grid, reference, representations, batch.source)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._sharding is not None:
            self._sharding.agree_on_gradients(self.parameters())
        if self.representation is None:
            return
        if self.consistency.terms_at(self.trainer.global_step):
            self.representation.fold_mean()
        else:
            for parameter in self.representation.parameters():
                parameter.grad = None  # or the optimizer's momentum would move it on steps without the terms

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        if self._sharding is None or by_value or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self._sharding.clip_gradients(parameters, gradient_clip_val)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning would keep the gradients through the next forward pass, where memory is at its peak.
        optimizer.zero_grad()
        # Here, since callbacks may save a checkpoint as soon as the step is done.
        if self.reference.updates_after(self.trainer.global_step + 1):
            assert self.policy is not None
            assert isinstance(self._reference, OnlineReference)
            self._reference.update(self.policy, self.reference.update_share)

    # ---- logging of training ------------------------------------------------------------------------

    def _logs_this_step(self) -> bool:
        every = int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _accumulate(self, terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            term = term.detach()
            self._window[name] = self._window[name] + term if name in self._window else term

    def _log_window(self) -> None:
        """Log what the whole optimizer step saw, not just its last micro-batch."""
        # Each term is a share of the step's mean, divided as the gradient is (see `Normalizers`).
        values = torch.stack(list(self._window.values())) / self.trainer.accumulate_grad_batches
        if self.trainer.world_size > 1:  # equally many have each share (see `DataParallel`)
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        logged = dict(zip(self._window, values, strict=True))
        self._window = {}
        # A step without the terms repeats the latest values, or `every_n_steps` could hide them from every log.
        names = ("mlc/", *(f"{term.name}/" for term in self.consistency.terms))
        self._latest_consistency |= {name: value for name, value in logged.items() if name.startswith(names)}
        logged |= self._latest_consistency
        for name, value in logged.items():
            self.log(f"train/{name}", value)
            if name in PROGRESS:
                self.log(PROGRESS[name], value, prog_bar=True, logger=False)

    # ---- validation ---------------------------------------------------------------------------------

    def _make_metrics(self, languages: tuple[str, ...], kind: DataKind) -> nn.ModuleDict:
        metrics: dict[str, torchmetrics.Metric] = {}
        if self.objective is not None:
            metrics["loss"] = LanguageMean(languages, higher_is_better=False)
        if self._needs_rejected and kind == "pairs":
            metrics["rewards/accuracies"] = LanguageMean(languages, higher_is_better=True)
            metrics["rewards/margins"] = LanguageMean(languages, higher_is_better=True)
        elif self._needs_rejected:
            metrics["rewards/chosen"] = LanguageMean(languages, higher_is_better=True)
            metrics["rewards/rejected"] = LanguageMean(languages, higher_is_better=False)
        metrics["nll"] = LanguageMean(languages, higher_is_better=False)
        mlc = self.consistency.mlc
        metrics["mlc/raw"] = Collinearity(mlc.temperature, mlc.scale)
        if self.consistency.needs.representations:
            metrics["mlc/extracted"] = Collinearity(mlc.temperature, mlc.scale)
        for term in self.consistency.terms:
            metrics[f"{term.name}/loss"] = ExampleMean()
        metrics["cosines"] = LanguageCosines(languages)
        return nn.ModuleDict(metrics)

    def on_validation_epoch_start(self) -> None:
        for metric in self._metrics.values():
            metric.reset()  # type: ignore[operator]

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, batch: Batch, split: str) -> None:
        """Measure the responses given the prompt in every language: the source language's, where it has no own."""
        assert self.policy is not None
        grid = run_batch(self.policy, batch, self._layer, self.consistency.needs.pooled_states)
        assert grid.states is not None
        metrics: Any = self._metrics
        reference = (
            None
            if self._reference is None
            else self._reference.grid(batch, split, pool=self.consistency.needs.pooled_states)
        )

        def samples(values: Tensor, there: Tensor) -> dict[str, Tensor]:
            examples, language = there.nonzero(as_tuple=True)
            return {"keys": batch.keys[examples], "language": language, "values": values[there]}

        if self.objective is not None:
            losses = self.objective.each_alone(self._responses(grid, reference, batch.source))
            source = torch.full_like(batch.keys, batch.source)
            metrics["loss"].update(keys=batch.keys, language=source, values=losses)
        chosen, rejected = grid.scores(CHOSEN, reference), grid.scores(REJECTED, reference)
        metrics["nll"].update(**samples(-chosen.mean_logps, chosen.present))
        if self._needs_rejected:
            rewards = self._rewards(chosen), self._rewards(rejected)
            if "rewards/accuracies" in metrics:
                margins = samples(rewards[0] - rewards[1], chosen.present & rejected.present)
                metrics["rewards/margins"].update(**margins)
                metrics["rewards/accuracies"].update(**margins | {"values": wins(margins["values"])})
            else:
                metrics["rewards/chosen"].update(**samples(rewards[0], chosen.present))
                metrics["rewards/rejected"].update(**samples(rewards[1], rejected.present))
        observed = self._observed(batch, grid, reference)
        for term in self.consistency.terms:
            groups = observed.is_group
            metrics[f"{term.name}/loss"].update(batch.keys[groups], term.losses(observed)[groups])
        metrics["mlc/raw"].update(batch.keys, grid.states, grid.present)
        metrics["cosines"].update(batch.keys, grid.states, grid.present)
        if observed.representations is not None:
            metrics["mlc/extracted"].update(batch.keys, observed.representations, grid.present)

    def _log_evaluation(self, split: str) -> None:
        results: dict[str, Tensor] = {}
        values: dict[str, Any] = {name: metric.compute() for name, metric in self._metrics.items()}  # type: ignore[operator]
        if "rewards/rejected" in values:
            values["rewards/margins"] = language_differences(values["rewards/chosen"], values["rewards/rejected"])
        for name, value in values.items():
            if name == "cosines":
                self.validation_cosines = value.tolist()
            elif name == "loss":
                # The loss that training lowers: on the source language. The others follow from `nll`/`rewards`.
                results[f"{split}/loss"] = value[self.languages[0]]
            elif isinstance(value, Tensor):
                results[f"{split}/{name}"] = value
            elif not name.startswith("rewards/") or value.keys() & set(self.languages):
                # Rewards of a kind of which there are no responses are left out.
                results |= {f"{split}/{name}/{key}": part for key, part in value.items()}
        self.validation_results = {name: float(value) for name, value in results.items()}
        self.log_dict(dict(self.validation_results), sync_dist=False, rank_zero_only=False)
        for metric in self._metrics.values():
            metric.reset()  # type: ignore[operator]

    # ---- prediction ---------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Greedy responses to every prompt: records of ``id``, ``language`` and ``response``."""
        assert self.policy is not None
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source)
            self._ends = end_tokens(self.policy.causal_lm, self._tokenizer)
        records = []
        for rows in batch.prompts:
            generated = self.policy.generate(
                rows, self.max_new_tokens, self._ends, self._tokenizer.pad_token_id, self._sharding is not None
            )
            responses = self._tokenizer.batch_decode(generated[:, rows.input_ids.shape[1] :], skip_special_tokens=True)
            for example, language, leads, response in zip(
                rows.example.tolist(), rows.language.tolist(), rows.leads.tolist(), responses, strict=True
            ):
                if leads:
                    where = {"id": batch.ids[example], "language": batch.languages[language]}
                    records.append({**where, "response": response})
        return records

    # ---- checkpoints --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.policy is not None
        trained_on = self.languages if self.consistency.terms else self.languages[:1]
        provenance = Provenance.of(
            self.source,
            self.policy.causal_lm,
            self.lora,
            trained_on,
            self.consistency,
            describe_run(
                self.trainer,
                self.source,
                self.objective,
                self.consistency,
                self.reference if self.uses_reference else None,
            ),
        )
        checkpoint[Provenance.KEY] = provenance.as_dict()
        if self.reference.is_updated:
            assert isinstance(self._reference, OnlineReference)
            checkpoint[OnlineReference.KEY] = self._reference.state_dict()
        # The frozen weights are those of the base model; only what was trained need be stored.
        kept = self._stored_keys()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.policy is not None
        own = Provenance.of(self.source, self.policy.causal_lm, self.lora)
        Provenance.read(checkpoint).require_same_model(own)
        if OnlineReference.KEY in checkpoint and self._reference is not None:
            if not isinstance(self._reference, OnlineReference) or not self.reference.is_updated:
                raise UserError(
                    "ckpt_path",
                    "the checkpoint was trained with a reference that follows the policy, and rewards are "
                    "measured against it; set model.reference.update_every_n_steps as it was",
                )
            self._reference.load_state_dict(checkpoint[OnlineReference.KEY])
        stored, expected = checkpoint["state_dict"].keys(), self._stored_keys()
        self.strict_loading = self.lora is None  # the frozen weights are there already
        for disagreement, verb in ((expected - stored, "lacks"), (stored - expected, "has")):
            if disagreement:
                raise UserError(
                    "ckpt_path",
                    f"the checkpoint {verb} {min(disagreement)}, unlike the model that the "
                    "configuration describes; use the model.consistency settings it was trained with",
                )

        for name, value in self.state_dict().items():
            found = checkpoint["state_dict"].get(name)
            # What a folder of shards has is not read yet.
            if isinstance(found, Tensor) and found.shape != value.shape:
                raise UserError(
                    "ckpt_path",
                    f"{name} has the shape {tuple(found.shape)} in the checkpoint and {tuple(value.shape)} here; "
                    "use the model.consistency settings it was trained with",
                )

    def _stored_keys(self) -> set[str]:
        """Keys of the state dict that belong into a checkpoint: under adapters, all but the frozen model's."""
        keys = set(self.state_dict())
        if self.lora is None:
            return keys
        assert self.policy is not None
        adapters = {f"policy.{name}" for name, weight in self.policy.named_parameters() if weight.requires_grad}
        return {key for key in keys if key in adapters or not key.startswith("policy.")}


@contextmanager
def _told_of(option: str) -> Iterator[None]:
    """Tell of ``option`` what torch refuses inside.

    Raises:
        UserError: It does.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(option, f"{first_line(error)}; change its options, or take another") from error


def wins(margins: Tensor) -> Tensor:
    """1 where the chosen response is preferred, 0 where the rejected one is, a half on a tie.

    Before training the policy is its own reference and every margin is 0: that is chance, not defeat.
    """
    return (torch.sign(margins) + 1) / 2
