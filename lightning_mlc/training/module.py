"""The LightningModule: an alignment objective on the source language, plus consistency terms.

``training_step`` is the step from top to bottom: score the batch with the reference, run the policy, add the
objective's loss and the consistency terms' loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.consistency import Consistency, Needs, Representation
from lightning_mlc.consistency.base import ConsistencyTerm
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.distributed.sharding import FSDP2
from lightning_mlc.errors import UserError
from lightning_mlc.lightning_internals import ends_window, profiled, writes_logs
from lightning_mlc.models.forward import run_batch
from lightning_mlc.models.lora import LoRA
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import Checked
from lightning_mlc.objectives import Objective
from lightning_mlc.reference import OnlineReference, PrecomputedReference, ReferenceSettings, describe_model, precompute
from lightning_mlc.sources import ModelSource
from lightning_mlc.training.building import PolicyBuilder, default_optimizer, make_optimizer, make_schedule, naming
from lightning_mlc.training.declined import Declined
from lightning_mlc.training.layer_choice import try_out
from lightning_mlc.training.loss_watch import LossWatch
from lightning_mlc.training.losses import Losses, observe
from lightning_mlc.training.prediction import Prediction, Predictor, Response, as_predictions
from lightning_mlc.training.preflight import check_data, check_model, check_options
from lightning_mlc.training.recipe import describe_run
from lightning_mlc.training.step_metrics import StepMetrics
from lightning_mlc.training.stored import require_same_tensors, restore_updated, stored_keys
from lightning_mlc.training.validation import Validation

PROGRESS = {"loss": "loss", "mlc/loss": "mlc", "rewards/accuracies": "acc"}
"""What the progress bar shows, and the short names it has room for."""


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
        chat_template: Chat template for a model without one (a base model), or in place of its own: a Jinja file, or
            ``plain``, ``chatml``, ``gemma`` or ``llama3``; null takes the tokenizer's. Checkpoints and exports keep it.
        attn_implementation: Attention implementation of transformers; null takes its default.
        packing: Run several sequences in a row instead of padding each, and a prompt once for all its responses.
            Null does so wherever the model gives the same results.
        max_new_tokens: Longest response that ``predict`` generates, in tokens.
        declined: Answer validation prompts, and log how many harmful and how many ordinary ones are declined; null
            answers none.
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
        chat_template: str | None = None,
        attn_implementation: str | None = None,
        packing: bool | None = None,
        max_new_tokens: int = 128,
        declined: Declined | None = None,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise UserError("model.max_new_tokens", f"must be at least 1, got {max_new_tokens}")
        self.source = ModelSource(name_or_path, gguf_file, revision, trust_remote_code, chat_template)
        self.builder = PolicyBuilder(
            self.source, lora, gradient_checkpointing, activation_offload, compile, attn_implementation, packing
        )
        self.losses = Losses(objective, consistency)
        self.consistency = consistency
        self.reference = reference
        self.optimizer_callable = optimizer
        self.scheduler_callable = scheduler
        self.lora = lora
        self.max_new_tokens = max_new_tokens
        self.declined = declined
        self.policy = self.representation = None
        self.languages: tuple[str, ...] = ()
        """Languages of the data, the source language first."""
        self.validation: Validation | None = None
        self.validation_results: dict[str, float] = {}
        """Metrics of the latest validation, by logged name."""
        self.validation_cosines: list[list[float]] = []
        """Mean cosines between languages of the raw hidden states in the latest validation."""
        self._reference: OnlineReference | PrecomputedReference | None = None
        self._initial: dict[str, str] = {}
        """Everything that precomputed scores depend on, except the data."""
        self._layer: int | None = None
        self._checked: Checked | None = None
        """How the model is run, once it has been tried."""
        self._terms: tuple[ConsistencyTerm, ...] = ()
        """Consistency terms of the current optimizer step."""
        self._predictor: Predictor | None = None

    # ---- set-up -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what cannot work together, before the model is loaded."""
        data, trainer = self._data, self.trainer
        check_options(self.builder, trainer, self._sharding)
        check_data(self.losses, self.reference, self.declined, data, trainer, self.lora is not None, stage)
        if self.policy is None:
            self._layer = check_model(self.builder, self.consistency.layer, data, trainer, self._sharding, stage)
        self.languages = data.languages
        self._loss_watch = LossWatch()  # new, because an earlier run may have ended in the middle of a step
        self._step_metrics = StepMetrics(("mlc/", *(f"{term.name}/" for term in self.consistency.terms)))
        self.validation = None if stage == "predict" else Validation(self.losses, data, self.declined)

    def configure_model(self) -> None:
        loaded_now = self.policy is None
        if self.policy is None:
            self.policy = self._load_policy()
            self._checked, self.consistency, self._layer = try_out(
                self.builder, self.policy, self.consistency, self._layer, self.trainer
            )
            if self.consistency.needs.representations:
                self.representation = Representation(self.consistency, self._checked.width)
        if self.uses_reference and not self.trainer.predicting:
            # Without adapters only a model just loaded is the initial one; it may have been trained since.
            self._set_up_reference(self.policy if loaded_now or self.lora is not None else None)
        if loaded_now and self._sharding is not None:
            for policy in self.policies():
                self._sharding.shard(policy, str(self.trainer.precision))
            if self.representation is not None:
                self._sharding.shard_methods(self.representation, "extract")

    def _load_policy(self) -> Policy:
        trainer, precision = self.trainer, str(self.trainer.precision)
        # Process 0 reads the weights of a sharded model for all.
        weights = self._sharding is None or trainer.is_global_zero
        model = self.builder.load(precision, trainer.strategy.root_device, weights)
        if self.reference.mode == "precomputed" and not self._initial and not trainer.predicting:
            self._initial = describe_model(model, precision) if trainer.is_global_zero else {}
        return self.builder.finish(model, self._checked, trainer.predicting)

    def _set_up_reference(self, initial: Policy | None) -> None:
        """Set the reference up now, before a checkpoint replaces the weights; ``initial`` is the model, if at hand."""
        if self.reference.mode == "precomputed":
            sharding, precision = self._sharding, str(self.trainer.precision)

            def load() -> Policy:
                policy = initial or self._load_policy()
                return policy if sharding is None else sharding.shard(policy, precision)

            translations = self.consistency.needs.reference_translations
            self._reference = precompute(self.trainer, self._data, load, self._initial, str(self.source), translations)
        elif self._reference is None:
            self._reference = OnlineReference(initial or self._load_policy())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.policy is not None
        rate = self.consistency.extractor_lr
        optimizer = make_optimizer(self.optimizer_callable, self.policy, self.representation, rate, self.trainer)
        if self.scheduler_callable is None:
            return optimizer
        schedule: Any = make_schedule(self.scheduler_callable, optimizer, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        with naming("model.scheduler"):  # some schedules end before the run does
            super().lr_scheduler_step(scheduler, metric)

    @property
    def _data(self) -> MultilingualData:
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @property
    def _sharding(self) -> FSDP2 | None:
        """The strategy, if it shards the model over processes."""
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, FSDP2) else None

    @property
    def uses_reference(self) -> bool:
        """Whether the policy is measured against a reference at all."""
        return self.losses.needs_reference(self.consistency.needs)

    def policies(self) -> list[Policy]:
        """The models that a step runs batches through: the policy, and the reference where it is another model."""
        assert self.policy is not None
        reference = [self._reference.policy] if isinstance(self._reference, OnlineReference) else []
        return [self.policy, *(policy for policy in reference if policy is not self.policy)]

    # ---- training -----------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Decide on the terms of the step, and leave out the translations if it has none."""
        if self.trainer.training:
            self._terms = self.consistency.terms_at(self.trainer.global_step)
            batch = batch if self._terms else batch.without_translations()
        return batch if self._sharding is None else self._sharding.with_equal_passes(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.policy is not None
        terms, needs = self._terms, Needs.of(self._terms)
        reference = None
        if self._reference is not None and self.losses.needs_reference(needs):
            with profiled(self.trainer, "reference forward"):  # first, because the policy's activations take up memory
                reference = self._reference.grid(batch, "train", needs, self._layer)
        layer, span = self._layer if needs.representations else None, partial(profiled, self.trainer)
        grid = run_batch(self.policy, batch, layer, needs.pooled_states, needs.positions, span)
        with profiled(self.trainer, "objective"):
            loss, metrics = self.losses.of_objective(batch, grid, reference)
        if terms:
            with profiled(self.trainer, "consistency loss"):
                if self.representation is not None and grid.states is not None:
                    self.representation.observe(grid.states, grid.present)
                observed = observe(self.representation, batch, grid, reference)
                added = self.losses.of_consistency(batch, observed, terms, detailed=writes_logs(self.trainer))
            loss, metrics = loss + added.loss, metrics | added.metrics
        elif self.representation is not None and self._sharding is None:
            # DDP expects every trainable parameter in every backward pass; the zero gradient is
            # dropped again in `on_before_optimizer_step`.
            loss = loss + sum(p.sum() for p in self.representation.parameters() if p.requires_grad) * 0.0
        self._loss_watch.add(loss, batch.ids)
        self._step_metrics.add({"loss": loss, **metrics})
        if ends_window(self.trainer, batch_idx):
            self._step_metrics.close(self.trainer)
        return loss

    def on_after_backward(self) -> None:
        """Look at the whole optimizer step, and log it. Only here a step waits for the device, which still has work."""
        means = self._step_metrics.read()
        if means is None:  # the step has more micro-batches
            return
        self._loss_watch.require_finite(float(means["loss"]), self.trainer.global_step)
        for name, value in means.items():
            self.log(f"train/{name}", value)
            if name in PROGRESS:
                self.log(PROGRESS[name], value, prog_bar=True, logger=False)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._sharding is not None:
            self._sharding.agree_on_gradients(self.parameters())
        if self.representation is None:
            return
        if self._terms:
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
        # Here, because callbacks may save a checkpoint as soon as the step is done.
        if self.reference.updates_after(self.trainer.global_step + 1):
            assert self.policy is not None
            assert isinstance(self._reference, OnlineReference)
            self._reference.update(self.policy, self.reference.update_share)

    # ---- validation and prediction ------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        assert self.validation is not None
        self.validation.reset()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert self.policy is not None
        assert self.validation is not None
        if dataloader_idx and self.declined is not None:  # prompts to answer
            self.validation.update_declined(batch, self._respond(batch, self.declined.max_new_tokens))
            return
        needs = self.consistency.needs
        grid = run_batch(self.policy, batch, self._layer, needs.pooled_states, needs.positions)
        split = _split(self.trainer)
        reference = None if self._reference is None else self._reference.grid(batch, split, needs, self._layer)
        self.validation.update(batch, reference, observe(self.representation, batch, grid, reference))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        assert self.validation is not None
        metrics, self.validation_cosines = self.validation.results()
        self.validation_results = {f"{_split(self.trainer)}/{name}": value for name, value in metrics.items()}
        self.log_dict(dict(self.validation_results), sync_dist=False, rank_zero_only=False)
        if self.declined is not None:
            self.declined.end_above(self.validation_results, self.trainer)

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        """Greedy responses to the prompts, in every language."""
        return as_predictions(batch, self._respond(batch, self.max_new_tokens))

    def _respond(self, batch: Batch, max_new_tokens: int) -> list[Response]:
        assert self.policy is not None
        if self._predictor is None:
            self._predictor = Predictor(self.policy, self.source, together=self._sharding is not None)
        return self._predictor.respond(batch, max_new_tokens)

    # ---- checkpoints --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.policy is not None
        reference = self.reference if self.uses_reference else None
        run = describe_run(self.trainer, self.source, self.losses.objective, self.consistency, reference)
        languages = self.languages if self.consistency.terms else self.languages[:1]
        provenance = Provenance.of(self.source, self.policy.causal_lm, self.lora, languages, self.consistency, run)
        checkpoint[Provenance.KEY] = provenance.as_dict()
        checkpoint[StepMetrics.KEY] = self._step_metrics.latest()
        if self.reference.is_updated:
            assert isinstance(self._reference, OnlineReference)
            checkpoint[OnlineReference.KEY] = self._reference.state_dict()
        kept = stored_keys(self.state_dict(), self.policy, adapters=self.lora is not None)
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.policy is not None
        Provenance.read(checkpoint).require_same_model(Provenance.of(self.source, self.policy.causal_lm, self.lora))
        self._step_metrics.restore(checkpoint.get(StepMetrics.KEY, {}))
        restore_updated(self._reference, self.reference, checkpoint.get(OnlineReference.KEY))
        self.strict_loading = self.lora is None  # a checkpoint of adapters does not have the frozen weights
        state = self.state_dict()
        require_same_tensors(checkpoint["state_dict"], state, stored_keys(state, self.policy, self.lora is not None))


def _split(trainer: Trainer) -> str:
    """The split that is measured."""
    return "test" if trainer.testing else "val"
