"""``trainer.precision: auto``: which precision is chosen, that one line gives the reason, and that a run keeps it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import Job, run_jobs
from torch.utils.flop_counter import FlopCounterMode

from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.cli import main
from lightning_mlc.commands import precision_option
from lightning_mlc.commands.precision_option import print_on_first, settle
from lightning_mlc.commands.training import run
from lightning_mlc.evaluation.systems.local import choose_dtype
from lightning_mlc.models.precision import (
    EMULATED_OPERATIONS,
    OPERATIONS,
    Device,
    Trial,
    _indexes,
    decide,
    features_in,
    has_several_processes,
    slow_bfloat16,
    try_both,
)

FAST, EVEN, SLOW = Trial(3.0, 1.0), Trial(1.0, 1.0), Trial(1.0, 3.1)


def never() -> Trial:
    raise AssertionError("there must be no trial")


def cpu(*features: str) -> Device:
    return Device("cpu", features=frozenset(features))


@pytest.mark.parametrize(
    ("device", "trial", "precision", "reason"),
    [
        (
            Device("cuda", "NVIDIA H100", (9, 0)),
            None,
            "bf16-mixed",
            "NVIDIA H100 (compute capability 9.0) has",
        ),
        (Device("cuda", "NVIDIA A100", (8, 0)), None, "bf16-mixed", "(compute capability 8.0) has bfloat16 units"),
        (
            Device("cuda", "Tesla T4", (7, 5)),
            None,
            "32-true",
            "Tesla T4 (compute capability 7.5) has no bfloat16 units",
        ),
        (Device("cuda"), None, "32-true", "no GPU was found"),
        (Device("rocm", "MI250", architecture="gfx90a"), None, "bf16-mixed", "MI250 (gfx90a) has bfloat16 units"),
        (Device("rocm", "MI300X", architecture="gfx942"), None, "bf16-mixed", "has bfloat16 units"),
        (Device("rocm", "RX 7900", architecture="gfx1100"), None, "bf16-mixed", "has bfloat16 units"),
        (Device("rocm", "RX 6900", architecture="gfx1030"), None, "32-true", "(gfx1030) has no bfloat16 units"),
        (Device("rocm", "MI50", architecture="gfx906"), None, "32-true", "(gfx906) has no bfloat16 units"),
        (Device("mps"), None, "32-true", "has not been measured on Apple GPUs"),
        (Device("tpu"), None, "32-true", "nothing is known of bfloat16 on tpu"),
        (cpu(), SLOW, "32-true", "this CPU has no bfloat16 units"),
        (
            cpu("amx_bf16", "avx512_bf16"),
            FAST,
            "bf16-mixed",
            "AMX and AVX-512 bfloat16, and bfloat16 took 0.33",
        ),
        (
            cpu("amx_bf16"),
            SLOW,
            "32-true",
            "this CPU has AMX, and bfloat16 took 3.1 times as long as",
        ),
        (cpu("amx_bf16"), None, "bf16-mixed", "this CPU has AMX"),
        (cpu("avx512_bf16"), SLOW, "32-true", "AVX-512 bfloat16, and bfloat16 took 3.1 times as long"),
        (cpu("avx512_bf16"), EVEN, "32-true", "and bfloat16 took as long as float32 in a trial"),
        (cpu("avx512_bf16"), None, "32-true", "without a trial only AMX is known to be faster"),
        (cpu("bf16"), FAST, "bf16-mixed", "this CPU has Arm bfloat16, and bfloat16 took 0.33 times as long"),
        (Device("cpu", features=None), FAST, "bf16-mixed", "it is not known whether this CPU has bfloat16 units, and"),
        (Device("cpu", features=None), None, "32-true", "it is not known whether"),
    ],
)
def test_what_is_chosen_and_why(device: Device, trial: Trial | None, precision: str, reason: str) -> None:
    needs_trial = device.kind == "cpu" and device.features != frozenset()
    found = decide(device, None if trial is None else (lambda: trial) if needs_trial else never)
    assert found.precision == precision
    assert reason in found.reason
    assert found.dtype == {"bf16-mixed": "bfloat16", "32-true": "float32"}[precision]


def test_units_are_read_from_what_the_kernel_says() -> None:
    intel = "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\nbugs\t: amx_none\n"
    arm = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\nCPU part\t: 0xd40\n"
    assert features_in(intel) == {"avx512_bf16", "amx_bf16"}
    assert features_in(arm) == {"bf16"}
    assert features_in("flags\t\t: fpu avx2 avx512f\n") == features_in("nothing") == frozenset()


@pytest.mark.parametrize(
    ("devices", "taken"),
    [("auto", [0, 1, 2]), (-1, [0, 1, 2]), (2, [0, 1]), ("1", [0]), ([2], [2]), ("1,2", [1, 2]), ([5], [0, 1, 2])],
)
def test_the_gpus_that_count_are_those_of_the_run(devices: Any, taken: list[int]) -> None:
    assert _indexes(devices, 3) == taken


@pytest.mark.parametrize(
    ("device", "operations"),
    [(cpu(), EMULATED_OPERATIONS), (cpu("amx_bf16"), OPERATIONS), (Device("cpu", features=None), OPERATIONS)],
)
@pytest.mark.parametrize("width", [32, 576, 4096])
def test_a_trial_multiplies_at_the_model_s_width_within_its_budget(
    width: int, device: Device, operations: float
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with FlopCounterMode(display=False) as counted:
        found = try_both(width, device)
    assert torch.equal(torch.rand(1), expected)
    assert math.isfinite(found.ratio)
    assert min(found.float32, found.bfloat16) > 1e-6  # seconds; the calls alone take longer
    # One product forward and two backward, in each dtype, four times. Sizes are rounded down.
    passes = counted.get_total_flops() / 8
    assert passes % width == 0
    assert passes <= operations
    if width > 256:
        assert passes > 0.9 * operations


@pytest.mark.parametrize(
    ("precision", "device", "trial", "warning"),
    [
        ("bf16-mixed", cpu(), SLOW, "it has no bfloat16 units (bfloat16 took 3.1 times as long as float32 in a trial)"),
        ("bf16-true", cpu("avx512_bf16"), SLOW, "bf16-true is slow on this CPU (bfloat16 took 3.1 times"),
        ("bf16", cpu(), SLOW, "32-true or auto is faster"),
        ("bfloat16", cpu(), SLOW, "float32 or auto is faster"),
        ("bf16-mixed", cpu("avx512_bf16"), FAST, None),
        ("bf16-mixed", cpu("amx_bf16"), None, None),
        ("bf16-mixed", Device("cuda", "Tesla T4", (7, 5)), None, None),
        ("32-true", cpu(), None, None),
        ("16-mixed", cpu(), None, None),
        ("64-true", cpu(), None, None),
        (None, cpu(), None, None),
    ],
)
def test_slow_bfloat16_is_warned_of(precision: Any, device: Device, trial: Trial | None, warning: str | None) -> None:
    found = slow_bfloat16(precision, device, never if trial is None else lambda: trial)
    if warning is None:
        assert found is None
    else:
        assert found is not None
        assert warning in found


@pytest.mark.parametrize(
    ("devices", "num_nodes", "environment", "several"),
    [
        ("auto", 1, {}, False),
        (1, 1, {"WORLD_SIZE": "1", "SLURM_NTASKS": "1"}, False),
        ("2", 1, {}, True),
        ("auto", 2, {}, True),
        ("auto", 1, {"WORLD_SIZE": "4"}, True),
        ("auto", 1, {"SLURM_NTASKS": "4"}, True),
    ],
)
def test_several_processes_are_known_before_they_meet(
    devices: Any, num_nodes: int, environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_several_processes(devices, num_nodes) is several


# ---- commands ---------------------------------------------------------------------------------------


def fit(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": model,
        "data.train_path": data,
        "data.val_share": 0.25,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    return ["fit", *(f"--{name}={value}" for name, value in options.items()), *more]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("precision: ")]


def kept(out: Path) -> tuple[str, str]:
    """The precision in the run's configuration and in its checkpoint."""
    config = yaml.safe_load((out / "config.yaml").read_text())
    checkpoint = read_checkpoint(out / "checkpoints" / "last.ckpt")
    return config["trainer"]["precision"], checkpoint["lightning_mlc"]["recipe"]["precision"]


def test_a_run_keeps_what_was_chosen_and_goes_on_with_it(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    chosen = decide(Device.of("cpu"), lambda: try_both(32, Device.of("cpu"))).precision
    assert main(fit(tiny_model, pairs_file, out)) == 0
    (line,) = lines_of(capsys)
    assert line.startswith(f"precision: {chosen}, because this CPU has ")
    assert kept(out) == (chosen, chosen)

    other = "bf16-mixed" if chosen == "32-true" else "32-true"
    path = (out / "checkpoints" / "last.ckpt").resolve()
    checkpoint = read_checkpoint(path)
    checkpoint["lightning_mlc"]["recipe"]["precision"] = other  # as another machine would choose
    torch.save(checkpoint, tmp_path / "other.ckpt")
    (tmp_path / "other.ckpt").replace(path)
    assert main(fit(tiny_model, pairs_file, out, "--trainer.max_steps=2", "--ckpt_path=auto")) == 0
    assert lines_of(capsys) == [f"precision: {other}, because the checkpoint was trained in it"]
    assert kept(out) == (other, other)

    given = [f"--ckpt_path={out / 'checkpoints' / 'last.ckpt'}", "--trainer.accelerator=cpu"]
    measured = options_of(*given, command="validate")
    print_on_first(settle(measured))
    assert (measured.trainer.precision, lines_of(capsys)) == (
        other,
        [f"precision: {other}, because the checkpoint was trained in it"],
    )
    explicit = options_of(*given, "--trainer.precision=64-true")
    print_on_first(settle(explicit))
    assert explicit.trainer.precision == "64-true"
    assert lines_of(capsys) == [f"precision: 64-true, as the configuration says; the checkpoint was trained in {other}"]


def options_of(*more: str, command: str = "fit") -> Any:
    """Parse the options of ``command``, without building anything from them."""
    from lightning_mlc.commands.training import TrainingCLI, make_cli

    class Parsed(TrainingCLI):
        def before_instantiate_classes(self) -> None: ...
        def instantiate_classes(self) -> None: ...
        def _run_subcommand(self, subcommand: str) -> None: ...

    return make_cli([command, "--config=dpo_mlc", *more], Parsed).config[command]


def test_a_trial_is_of_the_model_s_width_and_warns_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    widths = Counter[int]()

    def record(width: int, device: Device) -> Trial:
        assert device == cpu("avx512_bf16")
        widths[width] += 1
        return SLOW

    monkeypatch.setattr(precision_option, "try_both", record)
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, *_: cpu("avx512_bf16")))
    given = f"--model.name_or_path={tiny_model}"
    print_on_first(settle(options_of(given, "--trainer.precision=bf16-true")))
    assert [record.getMessage() for record in caplog.records if "precision" in record.getMessage()] == [
        "trainer.precision: bf16-true is slow on this CPU (bfloat16 took 3.1 times as long as float32 in a trial); "
        "32-true or auto is faster"
    ]
    assert widths == {32: 1}
    config = options_of(given)
    print_on_first(settle(config))
    assert (config.trainer.precision, widths) == ("32-true", {32: 2})
    print_on_first(settle(options_of(given, "--trainer.devices=2")))  # which would time it differently in each
    assert widths == {32: 2}


def test_a_precision_plugin_wins(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = "--trainer.plugins+=lightning.pytorch.plugins.precision.DoublePrecision"
    config = options_of(plugin)
    print_on_first(settle(config))
    assert config.trainer.precision is None
    assert lines_of(capsys) == ["precision: that of the precision plugin in the configuration"]
    other = "--trainer.plugins+=lightning.pytorch.plugins.io.TorchCheckpointIO"
    config = options_of(f"--model.name_or_path={tiny_model}", other)
    print_on_first(settle(config))
    assert config.trainer.precision in ("32-true", "bf16-mixed")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "estimate"])
def test_a_typo_is_refused_in_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--config=dpo_mlc", "--trainer.precision=bf61", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: trainer.precision: bf61 is not supported; choose auto or one of 32-true, bf16-mixed"
    )


def test_the_option_is_auto_in_every_recipe_but_the_published_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name, expected in (("dpo_mlc", "auto"), ("quickstart", "auto"), ("published", "bf16-mixed")):
        with pytest.raises(SystemExit):
            run(["fit", f"--config={name}", "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["precision"] == expected


def test_an_estimate_is_for_gpus_unless_told_otherwise(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["estimate", *(option for option in fit(tiny_model, pairs_file, tmp_path)[1:] if "accel" not in option)]
    assert main([*command, "--trainer.accelerator=cpu"]) == 0
    assert decide(Device.of("cpu"), lambda: try_both(32, Device.of("cpu"))).precision in lines_of(capsys)[0]
    if Device.of("auto").kind == "cpu":
        assert main(command) == 0
        assert lines_of(capsys)[0].startswith("precision: bf16-mixed, because most GPUs have bfloat16 units")


def test_evaluation_agrees() -> None:
    device = torch.device("cpu")
    assert choose_dtype("auto", device) == decide(Device.of("cpu")).dtype
    assert choose_dtype("bfloat16", device) == "bfloat16"


@pytest.mark.slow
def test_processes_take_the_same_or_are_refused(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Two processes of torchrun over gloo, and two processes that have chosen different precisions."""
    command = fit(tiny_model, pairs_file, tmp_path / "torchrun", "--trainer.devices=2")
    differing = fit(
        tiny_model, pairs_file, tmp_path / "differing", "--trainer.devices=2", "--trainer.precision=32-true"
    )
    callback = "--trainer.callbacks+=killing.OtherPrecision"
    ended = run_jobs([Job(command), Job([*differing, callback])], tmp_path / "jobs")
    assert [job.status for job in ended] == [0, 2]
    expected = decide(Device.of("cpu")).precision
    assert kept(tmp_path / "torchrun") == (expected, expected)
    said = [path.read_text() for path in sorted((tmp_path / "jobs" / "job0").rglob("stdout.log"))]
    assert [text.count("precision: ") for text in said] == [1, 0]
    errors = [line for text in ended[1].stderr for line in text.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: trainer.precision: is 32-true on some and bf16-mixed on other processes; give it explicitly"
    ]
