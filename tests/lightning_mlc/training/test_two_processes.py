"""Work that two processes divide before training, through the real command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import columns, example_rows, write_jsonl

from lightning_mlc.commands.training import run

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.slow
def test_two_processes_share_the_pass_of_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    """The division is uneven: one batch of training rows for one process, three of validation rows. Both get all
    scores."""
    data = write_jsonl(tmp_path / "pairs.jsonl", example_rows(17))
    outs = {}
    for mode, processes in (("online", 1), ("precomputed", 2)):
        outs[mode] = tmp_path / mode
        options = {
            "out": outs[mode],
            "model.name_or_path": tiny_model,
            "model.optimizer": "SGD",
            "model.optimizer.lr": 0.1,
            "model.consistency.mlc.weight": 0,
            "model.reference.mode": mode,
            "data.train_path": data,
            "data.val_share": 0.3,
            "data.batch_size": 4 // processes,
            "data.cache_dir": tmp_path / "cache",
            "trainer.accelerator": "cpu",
            "trainer.devices": processes,
            "trainer.strategy": "ddp" if processes > 1 else "auto",
            "trainer.precision": "32-true",
            "trainer.max_steps": 3,
            "trainer.enable_progress_bar": "false",
        }
        arguments = ["fit", *(f"--{name}={value}" for name, value in options.items())]
        if processes == 1:
            run(arguments)
            continue
        command = [sys.executable, "-m", "lightning_mlc", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
    # One shard of the training rows, and one from each process for the validation rows.
    folders = (tmp_path / "cache" / "reference").iterdir()
    assert sorted(len(list(folder.glob("*.safetensors"))) for folder in folders) == [1, 2]
    online, precomputed = columns(outs["online"]), columns(outs["precomputed"])
    assert online.keys() == precomputed.keys()
    for name, values in online.items():
        # the order of float32 sums differs
        assert precomputed[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert abs(online["train/rewards/margins"][-1]) > 1e-3
