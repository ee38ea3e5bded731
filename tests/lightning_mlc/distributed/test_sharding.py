"""Strategies that are refused, and models without weights. test_layouts.py tests the computations of FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, save_model

from lightning_mlc.cli import main
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.sources import ModelSource


@pytest.mark.parametrize(
    ("strategy", "advice"),
    [
        ("fsdp", "FSDP1 allows one forward pass per step, but a step has several; use --config strategy/fsdp2"),
        ("deepspeed_stage_3", "for ZeRO-3 use --config strategy/fsdp2"),
        ("deepspeed_stage_2", "for ZeRO-2 add --trainer.strategy.reshard_after_forward false"),
        (
            "lightning.pytorch.strategies.ModelParallelStrategy",
            "use --config strategy/fsdp2, which is FSDP2 with or without tensor parallelism",
        ),
        ("xla", "use auto, ddp, or --config strategy/fsdp2"),
    ],
)
def test_other_strategies_are_refused_in_one_line(
    strategy: str, advice: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--out={tmp_path / 'out'}", f"--model.name_or_path={tiny_model}", "--data.train_path=sample"]
    assert main(["fit", *words, f"--trainer.strategy={strategy}"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error == [line for line in error if line.startswith("error: trainer.strategy: ") and advice in line]
    assert len(error) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_without_weights_has_the_shapes_of_the_one_with(kind: str, tmp_path: Path) -> None:
    """This is the state of a process until process 0 has sent it the values."""
    source = ModelSource(str(save_model(tmp_path / "model", kind)))
    whole, shell = (load_causal_lm(source, torch.bfloat16, weights=weights) for weights in (True, False))
    for tensors in ("named_parameters", "named_buffers"):
        expected = {name: (t.shape, t.dtype) for name, t in getattr(whole, tensors)()}
        found = dict(getattr(shell, tensors)())
        assert {name: (t.shape, t.dtype) for name, t in found.items()} == expected
        assert all(tensor.is_meta for tensor in found.values())
    assert shell.training == whole.training
    assert shell.config._attn_implementation == whole.config._attn_implementation
