"""Logged speed, against torch's counter, a clock that moves when it is read, and lengths by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import columns, write_jsonl
from lightning.pytorch import Callback
from torch.utils.flop_counter import FlopCounterMode

from lightning_mlc.commands.training import TrainingCLI, run
from lightning_mlc.training import speed

COUNTED: list[int] = []


class Counter(Callback):
    """Operations of each training step, by torch's counter."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.mode = FlopCounterMode(display=False)
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mode.__exit__(None, None, None)
        COUNTED.append(self.mode.get_total_flops())


def row(number: int) -> dict[str, Any]:
    """One token per byte plus four per prompt: 30, 28 and 60 tokens; responses of 10 and 9 tokens with their end."""
    texts = {"en": 26, "sw": 24, "zh": 56}
    prompt = {language: f"{number}" + "x" * (length - 1) for language, length in texts.items()}
    return {"prompt": prompt, "chosen": "y" * 9, "rejected": "z" * 8}


RESPONSES = 30 + 10 + 30 + 9
TRANSLATIONS = 28 + 60
TOKENS = RESPONSES + TRANSLATIONS
PADDED = 40 + 40 + TRANSLATIONS
"""The shorter response is in a row as long as the other's. Translations of such different lengths are run
separately."""


def fit(model: Path, out: Path, *more: str, batch: int = 1) -> tuple[TrainingCLI, dict[str, list[float]]]:
    data = write_jsonl(out.parent / "rows.jsonl", [row(number) for number in range(9)])
    options = {
        "out": out,
        "model.name_or_path": model,
        "model.attn_implementation": "eager",  # the counter misses fused attention on CPUs
        "model.packing": "false",
        "data.train_path": data,
        "data.val_share": 0,
        "data.batch_size": batch,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.log_every_n_steps": 1,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    cli = run(["fit", *given, *more])
    return cli, columns(out, speed=True)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock moves it by a second, in which the device can do a billion operations."""
    ticks = iter(range(1000))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(speed, "get_available_flops", lambda device, dtype: 10**9 if dtype is torch.float32 else None)


@pytest.mark.usefixtures("ticking")
def test_figures(tiny_model: Path, tmp_path: Path) -> None:
    """The clock is read once when training starts and once for each log, so logs are a second apart."""
    COUNTED.clear()
    _, logged = fit(tiny_model, tmp_path / "with", f"--trainer.callbacks+={__name__}.Counter")
    assert logged["speed/tokens_per_second"] == [TOKENS] * 4
    assert logged["speed/padding"] == pytest.approx([1 - TOKENS / PADDED] * 4)
    whole = COUNTED.copy()
    COUNTED.clear()
    _, without = fit(
        tiny_model, tmp_path / "none", "--model.consistency.mlc.weight=0", f"--trainer.callbacks+={__name__}.Counter"
    )
    assert "speed/consistency_flops" not in without
    assert without["speed/tokens_per_second"] == [RESPONSES] * 4
    # The counter takes padding for tokens (one in eighty), and includes the extractor and, in the first step, the
    # comparison of two ways to compute logits.
    for found, expected in ((without, COUNTED), (logged, whole)):
        utilization = [operations / 1e9 for operations in expected[1:]]
        assert found["speed/model_flops_utilization"][1:] == pytest.approx(utilization, rel=0.03)
    share = [1 - less / more for less, more in zip(COUNTED[1:], whole[1:], strict=True)]
    assert logged["speed/consistency_flops"][1:] == pytest.approx(share, abs=0.01)


@pytest.mark.usefixtures("ticking")
def test_several_micro_batches_and_steps_in_one_log(tiny_model: Path, tmp_path: Path) -> None:
    more = [
        "--trainer.accumulate_grad_batches=2",
        "--trainer.log_every_n_steps=2",
        "--model.consistency.every_n_steps=2",
    ]
    _, logged = fit(tiny_model, tmp_path / "out", *more)
    # One of two steps runs translations: four times the responses, twice the translations.
    assert logged["speed/tokens_per_second"] == [4 * RESPONSES + 2 * TRANSLATIONS] * 2
    _, every = fit(tiny_model, tmp_path / "every", *more[:2])
    # Half of their additional operations when they are run in every step.
    half = [share / (1 - share) / 2 for share in every["speed/consistency_flops"]]
    assert logged["speed/consistency_flops"] == pytest.approx([added / (1 + added) for added in half])


@pytest.mark.usefixtures("ticking")
def test_translations_with_responses_are_translations(tiny_model: Path, tmp_path: Path) -> None:
    """MPO runs the responses in every language, through the reference too, and all of that is additional."""
    more = ["--model.consistency.mlc.weight=0", f"--trainer.callbacks+={__name__}.Counter"]
    counted = []
    for weight in (1, 0):
        COUNTED.clear()
        _, logged = fit(tiny_model, tmp_path / str(weight), *more, f"--model.consistency.mpo.weight={weight}")
        counted.append(COUNTED[1:])
        if weight:
            found = logged["speed/consistency_flops"][1:]
    assert found == pytest.approx([1 - less / more for more, less in zip(*counted, strict=True)], abs=0.01)


@pytest.mark.usefixtures("ticking")
def test_validation_takes_no_time_from_training(tiny_model: Path, tmp_path: Path) -> None:
    more = ["--trainer.log_every_n_steps=4", "--trainer.val_check_interval=2", f"--data.val_path={tmp_path}/rows.jsonl"]
    _, logged = fit(tiny_model, tmp_path / "out", *more)
    # Two periods of a second, before and after the validation in the middle, whose time is left out.
    assert logged["speed/tokens_per_second"] == [4 * TOKENS / 2]


def test_a_step_s_parts_are_seen_by_a_profiler(tiny_model: Path, tmp_path: Path) -> None:
    cli, _ = fit(tiny_model, tmp_path / "out", "--model.consistency.every_n_steps=2", "--trainer.profiler=simple")
    seen = {name: len(durations) for name, durations in cli.trainer.profiler.recorded_durations.items()}
    always = ("responses forward", "reference forward", "objective")
    assert {name: seen[f"[Step]{name}"] for name in always} == dict.fromkeys(always, 4)
    assert {name: seen[f"[Step]{name}"] for name in ("translations forward", "consistency loss")} == {
        "translations forward": 2,
        "consistency loss": 2,
    }


def test_nothing_watches_a_run_that_is_over(tiny_model: Path, tmp_path: Path) -> None:
    cli, _ = fit(tiny_model, tmp_path / "out")
    assert not any(policy._forward_hooks or policy._forward_pre_hooks for policy in cli.model.policies())


def test_adapters_are_their_own_reference(tiny_model: Path, tmp_path: Path) -> None:
    """The policy runs twice and is measured once: the same tokens, and a forward pass without gradients."""
    pytest.importorskip("peft")
    cli, logged = fit(tiny_model, tmp_path / "out", "--model.lora.r=2")
    assert len(cli.model.policies()) == 1
    assert logged["speed/padding"] == pytest.approx([1 - TOKENS / PADDED] * 4)


@pytest.mark.usefixtures("ticking")
def test_packed_rows(tiny_model: Path, tmp_path: Path) -> None:
    """If a prompt occurs once for both responses, and translations are in two rows without padding."""
    _, logged = fit(tiny_model, tmp_path / "out", "--model.packing=true")
    assert logged["speed/tokens_per_second"] == [49 + TRANSLATIONS] * 4
    assert logged["speed/padding"] == [0.0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_translations(tiny_model: Path, tmp_path: Path) -> None:
    _, logged = fit(tiny_model, tmp_path / "out", "--trainer.accelerator=gpu", "--trainer.devices=1")
    assert all(0 < share < 1 for share in logged["speed/consistency_memory"])
