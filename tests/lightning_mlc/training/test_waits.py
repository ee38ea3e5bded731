"""How often the host waits for the device in training: once in an optimizer step, and nowhere else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, labelled_rows, write_jsonl
from device_waits import OPERATOR, DeviceWaits
from lightning.pytorch import Callback

from lightning_mlc.commands.training import run
from lightning_mlc.lightning_internals import ends_window

STEPS = 3
SETTINGS: dict[str, Any] = {
    "data.val_share": 0.25,
    "data.batch_size": 2,
    "data.num_workers": 0,
    "model.optimizer": "AdamW",
    "model.optimizer.lr": 1e-3,
    "trainer.max_steps": STEPS,
    "trainer.accumulate_grad_batches": 2,
    "trainer.gradient_clip_val": 1.0,
    "trainer.precision": "32-true",
    "trainer.enable_model_summary": "false",
}
ON_FOLLOWED_CPU = {
    "trainer.accelerator": "cpu",
    "trainer.strategy": "lightning.pytorch.strategies.SingleDeviceStrategy",
    "trainer.strategy.device": "cpu:0",  # device_waits.DEVICE
}
THE_LOOK = "training/host_copy.py"

current: DeviceWaits | None = None
"""The recorder of the test that runs, for ``Mark``, which the command line makes."""


class Mark(Callback):
    """Tells the recorder which tensors are on the device, and which micro-batch runs: its step and whether it is the
    last of the step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert current is not None
        current.put(pl_module, *pl_module.policies())
        current.place = (0, False)  # the first batch is on its way

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert current is not None
        assert current.holds(batch.keys)
        current.place = (trainer.global_step, ends_window(trainer, batch_idx))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        assert current is not None
        current.place = None

    on_train_epoch_end = on_train_end = on_validation_start


def waits_of(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any] | None = None, *more: str
) -> DeviceWaits:
    """The waits of a run of ``fit``."""
    waits = DeviceWaits()
    monkeypatch.setattr(f"{__name__}.current", waits)
    data = write_jsonl(folder / "rows.jsonl", rows or example_rows(24))
    options = {"out": folder / "out", "model.name_or_path": model, "data.train_path": data, **SETTINGS}
    arguments = [f"--{name}={value}" for name, value in (options | ON_FOLLOWED_CPU).items()]
    with waits:
        run(["fit", *arguments, f"--trainer.callbacks+={__name__}.Mark", *more])
    return waits


def in_steps(waits: DeviceWaits, *without: str) -> list[Any]:
    """The waits inside training steps, except those of the operator and of lines that contain ``without``."""
    return [
        wait
        for wait in waits.found
        if wait.place is not None and not any(part in wait.where for part in (OPERATOR, *without))
    ]


def test_one_look_in_a_step(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches in a step, gradients clipped, a line in metrics.csv for each step, progress shown."""
    found = in_steps(waits_of(tiny_model, tmp_path, monkeypatch, None, "--data.val_share=0"))
    assert [wait.place for wait in found] == [(step, True) for step in range(STEPS)], found
    assert all(THE_LOOK in wait.where for wait in found)
    assert len(columns(tmp_path / "out")["train/loss"]) == STEPS


OTHERS: dict[str, tuple[str, ...]] = {
    "terms on hidden states": (
        "--model.objective=ORPO",
        "--model.consistency.pairwise_cosine.weight=1",
        "--model.consistency.source_cosine.weight=1",
        "--model.consistency.center=true",
        "--model.consistency.every_n_steps=2",
        "--trainer.gradient_clip_algorithm=value",
    ),
    "terms on responses": ("--model.consistency.mpo.weight=1", "--model.consistency.dco.weight=1"),
    "adapters": ("--model.lora.r=2", "--model.consistency.extractor=frozen"),
    "precomputed reference": ("--model.reference.mode=precomputed", "--trainer.val_check_interval=2"),
    "reference that follows": ("--model.reference.update_every_n_steps=2", "--model.gradient_checkpointing=true"),
    "no reference": ("--model.objective=SimPO", "--model.consistency.mlc.weight=0"),
    "sum of objectives": (
        "--model.objective=Sum",
        '--model.objective.objectives=[{"class_path": "CPO"}, {"class_path": "SFT"}]',
    ),
    "KTO": ("--model.objective=KTO", "--trainer.log_every_n_steps=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_one_look_in_a_step_of_every_kind(
    case: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "adapters":
        pytest.importorskip("peft")
    rows = labelled_rows(24) if case == "KTO" else None
    found = in_steps(waits_of(tiny_model, tmp_path, monkeypatch, rows, *OTHERS[case]))
    assert [wait.place for wait in found] == [(step, True) for step in range(STEPS)], found
    assert all(THE_LOOK in wait.where for wait in found)


@pytest.mark.slow
def test_padded_rows_wait_in_transformers_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks the device whether a mask has padding. Packed rows come with a mask that it does not look at."""
    waits = waits_of(tiny_model, tmp_path, monkeypatch, None, "--model.packing=false")
    counts = Counter(wait.place[1] for wait in in_steps(waits, "transformers/masking_utils.py"))
    assert counts == {True: STEPS}
    assert in_steps(waits, THE_LOOK)


class NoWaiting(Callback):
    """Makes torch raise an error at every wait that it knows, from the second step on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > 0:  # kernels have been compiled
            torch.cuda.set_sync_debug_mode("error")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    on_train_epoch_end = on_train_end = on_exception = on_validation_start  # type: ignore[assignment]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees(tiny_model: Path, tmp_path: Path) -> None:
    """The look waits for an event, which is not among the waits that torch knows. The speed is not logged, because
    that waits."""
    data = write_jsonl(tmp_path / "rows.jsonl", example_rows(24))
    options = {"out": tmp_path / "out", "model.name_or_path": tiny_model, "data.train_path": data, **SETTINGS}
    options |= {"data.val_share": 0, "trainer.accelerator": "gpu", "trainer.devices": 1}
    # The speed is also logged at the step `max_steps`, so the run has none.
    options |= {"trainer.max_steps": -1, "trainer.max_epochs": 1, "trainer.log_every_n_steps": 100}
    try:
        run(["fit", *(f"--{n}={v}" for n, v in options.items()), f"--trainer.callbacks+={__name__}.NoWaiting"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
