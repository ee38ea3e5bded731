"""The messages of a running command, if its output is no terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import columns, example_rows, write_jsonl
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_mlc.cli import main
from lightning_mlc.progress import quiet
from lightning_mlc.progress.quiet import Lines, quiet_libraries

# Parameters of the tiny model, by hand: embeddings, layers of q, k, v, o, the MLP and two norms, the last norm.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
PARAMETERS = 261 * 32 + 3 * LAYER + 32
ADAPTERS = 3 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
"""Adapters of rank 2, in each layer: q and o, k and v, the MLP."""


def fit(model: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, str]:
    """Standard output and error of a short training."""
    data = write_jsonl(folder / "pairs.jsonl", example_rows(8))
    given = [
        *("fit", f"--out={folder / 'out'}", f"--model.name_or_path={model}", f"--data.train_path={data}"),
        *("--data.val_share=0.25", "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.precision=32-true"),
    ]
    assert main([*given, *more]) == 0
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_a_run_without_a_terminal_can_be_followed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = fit(tiny_model, tmp_path, capsys)
    lines = err.splitlines()
    loading, model = (line for line in lines if line.startswith("model "))
    assert loading == f"model {tiny_model}: loading"
    assert model.startswith(
        f"model {tiny_model}: {PARAMETERS:,} parameters, all trained, float32 (trainer.precision 32-true), on cpu, "
        "packed rows; "
    )
    assert model.endswith("reference: a second copy of the model")
    beginnings = ["validation before training: 1 batches", "training: 2 steps", "validation after step 2: 1 batches"]
    assert [line for line in lines if line in beginnings] == beginnings
    last = next(line for line in lines if line.startswith("training: 2 of 2 steps in "))
    logged = columns(tmp_path / "out", speed=True)
    for word, name in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("MLC loss", "mlc/loss")):
        assert f", {word} {logged[f'train/{name}'][-1]:.3f}" in last
    assert f", {logged['speed/tokens_per_second'][-1]:,.0f} tokens/s" in last
    # Standard output has only the results; bars of other libraries and texts of the data appear nowhere.
    assert out.startswith("validation, before and after")
    for foreign in ("\r", "\x1b", "it/s", "Loading weights", "Tokenising", "FLOPs", "available", "bag 1"):
        assert foreign not in err


def test_what_is_turned_off_is_silent_and_adapters_are_counted(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    lora = ("--model.lora=LoRA", "--model.lora.r=2", "--trainer.enable_model_summary=true")
    _, err = fit(tiny_model, tmp_path, capsys, "--trainer.enable_progress_bar=false", *lora)
    assert not re.search("^(training|validation)", err, re.MULTILINE)
    assert f": {PARAMETERS:,} parameters, adapters of {ADAPTERS:,}, only the adapters are trained, float32" in err
    assert "reference: the model without its adapters" in err


def test_a_progress_bar_of_the_users_own_takes_the_place_of_ours(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar", "--data.val_share=0")
    _, err = fit(tiny_model, tmp_path, capsys, *own)
    assert not re.search("^(training|validation)", err, re.MULTILINE)


def test_bars_of_other_libraries_are_quiet_for_five_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tqdm.__init__
    with quiet_libraries():
        assert list(tqdm(range(3), desc="quick")) == [0, 1, 2]
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(quiet, "SECONDS", 0.0)  # as if five seconds had passed
        assert list(tqdm(range(3), desc="slow")) == [0, 1, 2]
        assert capsys.readouterr().err == "slow: 0 of 3\n"
    assert tqdm.__init__ is before
    assert list(tqdm(range(3), desc="ours no more")) == [0, 1, 2]
    assert "\r" in capsys.readouterr().err


def test_bitsandbytes_asks_no_hub_while_it_is_imported() -> None:
    """It does on CPUs with bfloat16 instructions alone, so this test makes the same call on any CPU, too."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("kernels")
    script = """
import socket

def refused(*args, **options):
    print("asked the network", flush=True)
    raise OSError("no network in this test")

socket.getaddrinfo = socket.create_connection = refused
from lightning_mlc.progress.quiet import quiet_libraries
with quiet_libraries():
    import kernels
    try:
        kernels.get_kernel("kernels-community/quantization-bitsandbytes", version=1)
    except Exception as error:
        print("gave up:", type(error).__name__)
    import bitsandbytes
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_KERNELS", "HF_HUB_OFFLINE")}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert re.fullmatch(r"gave up: \w+\n", ended.stdout), ended
    assert "kernels-community" not in ended.stderr


def test_a_bar_is_one_line_every_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    now = 0.0
    monkeypatch.setattr(sys, "stderr", stream)
    lines = Lines(clock=lambda: now)
    for now in (6, 12, 35.9, 36, 60):
        lines.write(f"\rfile.gguf: : {now} of 272   ")
        lines.write("\n")
        lines.write("\x1b[A")
    assert stream.getvalue() == "file.gguf: 6 of 272\nfile.gguf: 36 of 272\n"
