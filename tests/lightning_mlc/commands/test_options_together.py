"""Combinations of the options that make a model fit into memory: the same losses as without them, or a refusal."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import columns, example_rows, save_model, write_jsonl

from lightning_mlc.cli import main
from lightning_mlc.commands.training import run

OPTIONS = {
    "accumulate": ["--data.batch_size=2", "--trainer.accumulate_grad_batches=2"],
    "checkpointing": ["--model.gradient_checkpointing=true"],
    "compile": ["--model.compile=true"],
    "lora": ["--model.lora.r=4"],
    "nf4": ["--model.lora.quantize=nf4"],
    "int8": ["--model.lora.quantize=int8"],
    "offload": ["--model.gradient_checkpointing=true", "--model.activation_offload=true"],
}
MODELS = ("lora", "nf4", "int8")
"""Options that change the trained weights. The others must not change anything."""
slow = pytest.mark.slow
bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
Losses = Callable[[frozenset[str]], list[float]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Losses of two optimizer steps of DPO + MLC with the given options. The second depends on the first's gradient."""
    folder = tmp_path_factory.mktemp("together")
    model = save_model(folder / "model", hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=2)
    data = write_jsonl(folder / "pairs.jsonl", example_rows(8))
    found: dict[frozenset[str], list[float]] = {}

    def run_once(names: frozenset[str]) -> list[float]:
        if names not in found:
            out = folder / "-".join(["out", *sorted(names)])
            options = [f"--out={out}", f"--model.name_or_path={model}", f"--data.train_path={data}"]
            options += [
                "--data.val_share=0",
                "--data.batch_size=4",
                "--trainer.accelerator=cpu",
                "--trainer.max_steps=2",
            ]
            options += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
            options += ["--model.optimizer=AdamW", "--model.optimizer.lr=1e-2"]
            run(["fit", *options, *(option for name in OPTIONS if name in names for option in OPTIONS[name])])
            found[names] = columns(out)["train/loss"]
        return found[names]

    return run_once


@pytest.mark.parametrize(
    "names",
    [
        "accumulate",
        "checkpointing",
        pytest.param("accumulate checkpointing", marks=slow),
        "lora",
        pytest.param("accumulate checkpointing lora", marks=slow),
        pytest.param("lora nf4", marks=[bitsandbytes, slow]),
        pytest.param("accumulate checkpointing lora nf4", marks=[bitsandbytes, slow]),
        # Combinations with compile take a minute each.
        pytest.param("accumulate checkpointing compile lora nf4", marks=[bitsandbytes, slow]),
        pytest.param("lora int8", marks=[bitsandbytes, slow]),
        pytest.param("accumulate checkpointing lora int8", marks=bitsandbytes),
    ],
)
def test_they_change_no_loss(losses: Losses, names: str) -> None:
    chosen = frozenset(names.split())
    model = chosen & set(MODELS)
    first, second = losses(chosen)
    expected = losses(frozenset(model))
    # The order of float32 sums differs. In the second step, Adam's division by small gradients magnifies this.
    assert first == pytest.approx(expected[0], rel=1e-5)
    assert second == pytest.approx(expected[1], rel=1e-2)
    assert abs(second - first) > 0.05  # so that a wrong gradient would show in the second step
    # Adapters begin as 0, and a quantised policy is its own reference, so only two things differ a little: the hidden
    # states, and the extractor, which is drawn after the adapters.
    tolerance = 1e-2 if model & {"nf4", "int8"} else 1e-3 if model else 1e-5
    assert first == pytest.approx(losses(frozenset())[0], rel=tolerance)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("offload", "model.activation_offload: the model is on the CPU"),
        ("offload lora", "model.activation_offload: the model is on the CPU"),
        ("offload compile", "model.compile: layers that offload their activations cannot be compiled"),
        ("compile lora int8", "model.compile: int8 products cannot be compiled"),
        ("nf4", "model.lora.quantize: needs bitsandbytes"),
    ],
)
def test_or_they_are_refused_at_start(
    names: str,
    message: str,
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if names == "nf4":
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else found(name)
        )
    options = [option for name in names.split() for option in OPTIONS[name]]
    fit = ["fit", f"--out={tmp_path / 'out'}", f"--model.name_or_path={tiny_model}", f"--data.train_path={pairs_file}"]
    assert main([*fit, "--trainer.accelerator=cpu", *options]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_offload_needs_checkpointing(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", f"--out={tmp_path / 'out'}", f"--model.name_or_path={tiny_model}", "--data.train_path=sample"]
    assert main([*fit, "--model.activation_offload=true"]) == 2
    assert "model.activation_offload: offloads what gradient checkpointing keeps" in capsys.readouterr().err
