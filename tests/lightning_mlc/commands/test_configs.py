"""Every shipped configuration: each key is explained, and a step runs with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_model

from lightning_mlc.commands.training import TrainingCLI, run, shipped_configs
from lightning_mlc.consistency import MLC, Consistency
from lightning_mlc.training.schedules import Warmup

ROOT = Path(__file__).parents[3]
CONFIGS = shipped_configs()
OVERLAYS = {
    "apart",
    "lora",
    "one_gpu_7b",
    "qlora",
    "retain_kl",
    "self_distillation",
    "stop_early",
    "logger/tensorboard",
    "logger/wandb",
    "paper/qwen2.5-7b",
    "paper/gemma-2-9b",
    "strategy/ddp",
    "strategy/fsdp2",
}
QUICK = {"dpo_mlc", "sft_mlc"}
"""The quick round runs a step of these; test_every_key_is_an_option parses the others there."""
SECTIONS = {"trainer", "model", "data", "logger"}
"""Keys that only contain other keys and have telling names, such as ``class_path`` and ``init_args``."""


def test_all_of_the_folder_is_shipped() -> None:
    there = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert there == set(CONFIGS)
    assert there > OVERLAYS


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_has_a_comment(name: str) -> None:
    lines = CONFIGS[name].read_text().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if key := re.match(r"\s*(\w+):", line):
            explained = before.lstrip().startswith("#") or key[1] in SECTIONS | {"class_path", "init_args"}
            assert explained, f"{name}: {line}"


def overlaid(name: str) -> list[str]:
    """The recipe ``name``; if it is an overlay, on top of the recipe that it is for."""
    if name not in OVERLAYS:
        return [name]
    return ["published" if name.startswith("paper/") else "quickstart", name]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in QUICK])
def test_every_key_is_an_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(["fit", *(f"--config={config}" for config in overlaid(name)), "--print_config"])
    assert stop.value.code == 0
    assert "name_or_path" in yaml.safe_load(capsys.readouterr().out)["model"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_a_step_runs(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the loggers' folders are relative paths
    if name.startswith("logger/"):
        pytest.importorskip(Path(name).name)
    if name.startswith("strategy/"):
        pytest.skip("needs several processes, as in test_layouts.py")
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    model = tiny_model
    if name.startswith("paper/"):
        # A tiny Gemma 2 has sliding windows and caps scores and logits, as a large one does.
        kind = {"paper/qwen2.5-7b": "qwen2", "paper/gemma-2-9b": "gemma2"}[name]
        model = save_model(tmp_path / kind, kind)
    configs = overlaid(name)
    cli = run(
        [
            "fit",
            *(f"--config={config}" for config in configs),
            f"--model.name_or_path={model}",
            "--model.gguf_file=null",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            f"--trainer.limit_val_batches={1.0 if name == 'stop_early' else 1}",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert isinstance(cli, TrainingCLI)
    assert cli.trainer.global_step == 1
    out = tmp_path / next(
        out for config in reversed(configs) if (out := yaml.safe_load(CONFIGS[config].read_text()).get("out"))
    )
    assert (out / "checkpoints" / "last.ckpt").exists()
    if name == "logger/tensorboard":
        assert list((tmp_path / "runs" / "tensorboard").rglob("events.out.tfevents.*"))
    if name == "logger/wandb":
        assert list((tmp_path / "runs" / "wandb").rglob("*.wandb"))


def test_the_published_settings_are_those_of_the_authors(tiny_model: Path, tmp_path: Path) -> None:
    """Values from https://github.com/Yuyan-B/MLC: its training configurations and the defaults of its code."""
    options = [f"--model.name_or_path={tiny_model}", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=1"]
    cli = run(["fit", "--config=published", f"--out={tmp_path / 'out'}", *options])
    assert cli.model.consistency == Consistency(
        mlc=MLC(weight=0.8, temperature=0.2, scale="top"),
        layer=-1,
        extractor="linear",
        extractor_dim=512,
        extractor_bias=True,
        extractor_lr=None,
        center=False,
        every_n_steps=2,
    )
    assert cli.model.losses.objective.beta == 0.1
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [6e-7, 6e-7]
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, Warmup)
    assert (schedule.warmup, schedule.decay, schedule.final, schedule.from_zero) == (0.1, "cosine", 0.0, True)
    assert cli.datamodule.val_share == 0
    assert cli.datamodule.batch_size == 1
    assert cli.config.fit.trainer.accumulate_grad_batches == 4
    # LLaMA-Factory's bf16 keeps float32 weights, unless `pure_bf16` is set.
    assert cli.config.fit.trainer.precision == "bf16-mixed"
    assert cli.datamodule.languages == ("en", "zh", "ru", "ja", "ar", "bn", "sw", "ur", "ps", "ku")
