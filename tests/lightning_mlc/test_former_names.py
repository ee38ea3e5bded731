"""Paths in users' configurations keep working after a module has moved."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

from lightning_mlc.cli import main
from lightning_mlc.distributed.sharding import FSDP2
from lightning_mlc.training.schedules import Warmup


@pytest.mark.parametrize(
    ("former", "found"), [("lightning_mlc.schedules.Warmup", Warmup), ("lightning_mlc.sharding.FSDP2", FSDP2)]
)
def test_a_former_name_is_the_same_class(former: str, found: type) -> None:
    assert pkgutil.resolve_name(former) is found


def test_a_configuration_with_former_names_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "former.yaml"
    config.write_text(
        "model:\n  scheduler:\n    class_path: lightning_mlc.schedules.Warmup\n    init_args:\n      warmup: 0.25\n"
        "trainer:\n  strategy:\n    class_path: lightning_mlc.sharding.FSDP2\n    init_args:\n      cpu_offload: true\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "quickstart", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "warmup: 0.25" in printed
    assert "cpu_offload: true" in printed
