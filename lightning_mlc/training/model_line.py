"""One line about the model that a command runs."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_mlc.progress.bars import say
from lightning_mlc.training.module import AlignmentModule


class ModelLine(Callback):
    """Prints one line about the model before anything is run. Lightning's summary would list our own wrappers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print that the model is being loaded, because that can take minutes."""
        assert isinstance(pl_module, AlignmentModule)
        if pl_module.policy is None:
            say(f"model {pl_module.source}: loading")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        say(model_line(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_start(trainer, pl_module)

    on_test_start = on_predict_start = on_fit_start


def model_line(trainer: Trainer, module: AlignmentModule) -> str:
    """Parameters, trained parameters, dtype, device, packing, and the adapters, extractor and reference if any."""
    assert module.policy is not None
    model = module.policy.causal_lm
    trains = trainer.state.fn == TrainerFn.FITTING
    trained = _trained(module.policy)
    parameters = int(model.num_parameters())
    parts = [f"{_amount(parameters)} parameters"]
    if module.lora is not None:
        parts = [f"{_amount(parameters - trained)} parameters, adapters of {_amount(trained)}"]
        if module.lora.quantize is not None:
            parts.append(str(module.lora.quantize))
    if trains and module.lora is None:
        parts.append("all trained" if trained == parameters else f"{_amount(trained)} trained")
    elif trains:
        parts.append("only the adapters are trained")
    parts.append(f"{str(model.dtype).removeprefix('torch.')} (trainer.precision {trainer.precision})")
    parts.append(f"on {trainer.strategy.root_device}")
    if trainer.world_size > 1:
        parts.append(f"{trainer.world_size} processes")
    layout = trainer.datamodule.layout  # type: ignore[attr-defined]
    parts.append("packed rows" if layout.packed else "padded rows")
    lines = [f"model {module.source}: {', '.join(parts)}"]
    extractor = 0 if module.representation is None else _size(module.representation)
    if extractor and module.representation is not None:
        how = "" if not trains else ", trained" if _trained(module.representation) else ", not trained"
        lines.append(f"extractor of {_amount(extractor)}{how}")
    if not trainer.predicting and module.uses_reference:
        lines.append(f"reference: {_reference(module)}")
    return "; ".join(lines)


def _reference(module: AlignmentModule) -> str:
    if module.reference.mode == "precomputed":
        return "precomputed scores"
    return "the model without its adapters" if module.lora is not None else "a second copy of the model"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _amount(count: int) -> str:
    """``count`` in few digits: 31,584, 134.5 M, 7.62 B."""
    if count < 100_000:
        return f"{count:,}"
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"
