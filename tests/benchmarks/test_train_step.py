"""The benchmark of the training step: all variants compute the same, and the verdicts follow from the figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import gpu, memory, train_step
from benchmarks.architectures import ARCHITECTURES
from benchmarks.published import IGNORED, Pair, collate
from benchmarks.steps.measuring import VariantMeasurements, disagreement
from benchmarks.steps.ours import _arguments
from benchmarks.steps.parity import Parity
from benchmarks.steps.reporting import target_lines, write
from benchmarks.steps.results import Target, ratio, result, targets
from benchmarks.steps.settings import StepSettings, plan_pairs
from benchmarks.steps.turns import Counts, Memory, Step, Turns
from benchmarks.steps.variants import VARIANTS

CPU = torch.device("cpu")


def take(variant: str, settings: StepSettings) -> tuple[list[Step], list[Counts]]:
    """Run a variant in this process, with all steps requested in advance."""
    planned = plan_pairs(settings)
    here, there = Pipe()
    for _ in range(len(planned) + 1):
        here.send("next")
    turns = Turns(there, CPU)
    VARIANTS[variant](settings, planned, turns)
    turns.count()
    assert here.recv() == "ready"
    steps = [here.recv() for _ in planned]
    assert here.recv().peak > 1e8  # torch is loaded in this process
    return steps, here.recv()


# ---- the variants --------------------------------------------------------------------------------------------------


def test_published_recipe_and_ours_are_the_same_mathematics(settings: StepSettings, tmp_path: Path) -> None:
    """Two implementations over some optimizer steps: one pads everything together, the other does not."""
    settings = replace(settings, extractor=str(tmp_path / "extractor.safetensors"))
    ours, _ = take("dpo_mlc", settings)
    theirs, _ = take("published", settings)
    assert [step.ids for step in ours] == [step.ids for step in theirs]
    assert [tuple(pair.id for pair in pairs) for pairs in plan_pairs(settings)] == [step.ids for step in ours]
    # The order of float32 sums differs, and the optimizer's steps carry this on.
    assert [step.loss for step in theirs] == pytest.approx([step.loss for step in ours], abs=1e-5)
    assert ours[-1].loss < ours[0].loss - 0.01  # the weights move this much meanwhile


def test_what_is_counted_is_what_can_be_counted_by_hand(settings: StepSettings) -> None:
    settings = replace(settings, warm_up=1, steps=2, counted_steps=2)
    pairs = plan_pairs(settings)[1]
    _, (counts, _) = take("published", settings)
    rows, length = 2 * 2 + 2 * 3, max(len(p.prompts[0]) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    length = max(length, *(len(prompt) for p in pairs for prompt in p.prompts))
    length = (length + 7) // 8 * 8
    assert counts.trained == counts.frozen == rows * length
    # The tiny Llama: 3 layers, width 32, 4 heads of width 8, half as many for keys and values, 48 inside the MLP.
    vocabulary = AutoConfig.from_pretrained(settings.model.name_or_path).vocab_size
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    per_position = 2 * (3 * layer + 32 * vocabulary)
    # Two products forward, QK and PV, for policy and reference; five such products backward.
    attention = 3 * rows * (2 * 2 + 5) * 2 * 4 * length**2 * 8
    extractor = 3 * 2 * (2 * 3) * 32 * 512
    svd = 2 * 2 * 3 * 3 * 512  # U times the scaled V, in its backward pass
    # Forward, backward for inputs and for weights, and the reference's forward.
    expected = 4 * rows * length * per_position + attention + extractor + svd
    # Up to transformers 5.17, the angles of the positions are a product too.
    angles = 2 * (2 * length * 4)
    assert counts.flops in (expected, expected + angles)


def test_dpo_alone_runs_the_pairs_alone(settings: StepSettings) -> None:
    settings = replace(settings, warm_up=0, steps=2, counted_steps=1)
    _, (counts,) = take("dpo", settings)
    real = sum(pair.pair_tokens for pair in plan_pairs(settings)[0])
    prompts = sum(len(pair.prompts[0]) for pair in plan_pairs(settings)[0])
    # A prompt may be computed once for both responses. Padding at most doubles the rest.
    assert real - prompts <= counts.trained < 2 * real
    assert counts.frozen <= counts.trained + 200  # the head is tried on a few tokens first


def test_rows_of_the_published_batch() -> None:
    pairs = [Pair("a", ([1, 2], [3]), [4], [5, 6]), Pair("b", ([7], [8, 9]), [10], [11])]
    rows = collate(pairs, 0, CPU)
    assert rows.input_ids[:, :5].tolist() == [
        [1, 2, 4, 0, 0],
        [7, 10, 0, 0, 0],
        [1, 2, 5, 6, 0],
        [7, 11, 0, 0, 0],
        [1, 2, 0, 0, 0],
        [3, 0, 0, 0, 0],
        [7, 0, 0, 0, 0],
        [8, 9, 0, 0, 0],
    ]
    assert rows.input_ids.shape == (8, 8)
    assert rows.attention_mask.sum(1).tolist() == [3, 2, 4, 2, 2, 1, 1, 2]
    assert rows.labels[2, :5].tolist() == [IGNORED, IGNORED, 5, 6, IGNORED]
    assert (rows.labels[4:] == IGNORED).all()
    assert pairs[0].pair_tokens == 3 + 4
    assert pairs[0].translation_tokens == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As given in the model cards and on the hub.
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("gemma-2-2b", 2_614_341_888),
    ],
)
def test_architectures_have_the_sizes_they_are_known_by(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_memory() -> None:
    before = memory.in_use(CPU)
    held = torch.ones(1 << 26)
    assert memory.in_use(CPU) - before > 0.9 * held.nbytes
    assert memory.peak(CPU) >= memory.in_use(CPU)
    del held


# ---- the verdicts --------------------------------------------------------------------------------------------------


def measured(seconds: list[float], teraflops: list[float], gigabytes: float, warm_up: int = 1) -> VariantMeasurements:
    """Measurements of a worker. Its first step took 99 s, but does not count."""
    steps = [Step(s, ("a",), 0.5) for s in [99.0] * warm_up + seconds]
    counts = [Counts(int(t * 1e12), 300, 100) for t in teraflops]
    return VariantMeasurements(warm_up, steps, counts, Memory(10**9, int(gigabytes * 1e9)))


PUBLISHED = measured([10.0, 20.0, 10.0], [8.0, 16.0], 20.0)
DPO = measured([2.0, 2.0, 4.0], [1.0, 2.0], 4.0)
OURS = measured([4.0, 6.0, 5.0], [2.0, 5.0], 7.0)  # 0.4, 0.3 and 0.5 of the published times
TRL = measured([2.0, 1.9, 5.0], [1.0, 2.0], 3.9)


def test_targets() -> None:
    found = targets({"published": PUBLISHED, "dpo": DPO, "dpo_mlc": OURS, "trl": TRL})
    assert [t.value for t in found] == pytest.approx(
        [
            0.4,
            7 / 20,
            # 4 s / 2 TFLOP against 2 / 1, and 6 / 5 against 2 / 2: 1 and 1.2, the third step is not counted.
            1.1,
            # 2 / 2, 2 / 1.9, 4 / 5
            1.0,
            4 / 3.9,
        ]
    )
    assert [t.met for t in found] == [True, True, True, True, False]
    assert target_lines(found[3:]) == (
        "met           time of a step, dpo / trl: at most 1.00, is 1.000\n"
        "NOT MET       peak memory, dpo / trl: at most 1.00, is 1.026"
    )


def test_a_bound_missed_by_little_is_missed() -> None:
    assert Target("t", 0.40, 0.4001).met is False
    assert Target("t", 0.40, float("nan")).met is False


def test_no_verdict_without_figures() -> None:
    found = targets(
        {"published": PUBLISHED, "dpo_mlc": OURS, "trl": VariantMeasurements(failure="not installed")}, usual=False
    )
    assert [t.met for t in found] == [None] * 5
    assert [t.value for t in found] == [0.4, 0.35, None, None, None]
    shown = target_lines(found).splitlines()
    assert shown[0] == "no target     time of a step, dpo_mlc / published at these settings: is 0.400"
    assert shown[3] == "not measured  time of a step, dpo / trl: at most 1.00"


def test_ratio_is_taken_step_by_step() -> None:
    """The median of ratios, not the ratio of medians: the medians of 1, 5, 9 and of 9, 1, 5 are equal."""
    seconds: Callable[[VariantMeasurements], list[float]] = lambda m: [step.seconds for step in m.timed]  # noqa: E731
    one, other = measured([1.0, 5.0, 9.0], [], 1.0), measured([9.0, 1.0, 5.0], [], 1.0)
    assert ratio(one, other, seconds) == pytest.approx(9 / 5)


def test_result_of_a_variant() -> None:
    pair = Pair("a", ([1, 2], [3, 4, 5]), [6], [7, 8])
    found = result("dpo_mlc", OURS, [[pair]] * 4)
    assert (found.seconds, found.steps, found.peak_bytes, found.bytes_before) == (5.0, 3, 7 * 10**9, 10**9)
    assert (found.real_tokens, found.trained_positions, found.frozen_positions) == (7 + 3, 300, 100)
    assert found.flops == 3.5e12
    assert found.flops_per_second == pytest.approx((2e12 / 4 + 5e12 / 6) / 2)
    assert result("dpo", DPO, [[pair]] * 4).real_tokens == 7


def test_other_examples_are_noticed() -> None:
    planned = [[Pair("a", ([1],), [2], [3])], [Pair("b", ([1],), [2], [3])]]
    assert disagreement({"dpo": measured([1.0], [], 1.0)}, planned) == [
        "dpo: step 2 did not train on the planned examples"
    ]


def test_parity_does_not_hold_of_nan() -> None:
    assert Parity([0.5, 0.6], [0.5, 0.60009]).holds
    assert not Parity([0.5, 0.6], [0.5, 0.60011]).holds
    assert not Parity([float("nan")], [0.5]).holds


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1"], "--steps: must be at least 2, got 1"),
        (["--steps", "2", "--counted_steps", "3"], "--counted_steps: there are only 2 steps"),
        (["--steps", "60"], "has 16 rows, too few for 63 steps of 2"),
        (["--set", "model.consistency.mlc.weight"], "--set: model.consistency.mlc.weight is not of the form KEY=VALUE"),
        (["--set", "data.batch_size=1"], "--set: data.batch_size must be the same for all variants; use --batch_size"),
        (["--languages", "en", "fr"], "pairs.jsonl row 1: has no prompt in 'fr', which the published recipe needs"),
    ],
)
def test_what_is_refused(
    settings: StepSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = ["--model", settings.model.name_or_path, "--data", settings.data, "--out", str(tmp_path / "out")]
    assert train_step.main([*given, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_for_all_are_options_of_fit(settings: StepSettings) -> None:
    """`--set` refuses options by the names that the command uses."""
    given = {argument.split("=")[0] for argument in _arguments(settings, 0.8, Path("out"), 1)}
    assert {f"--{key}" for key in train_step.SHARED_OPTIONS} <= given


@pytest.mark.slow
def test_no_ratio_of_variants_that_disagree(
    settings: StepSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, with another temperature for ours, which gives another loss."""
    out = tmp_path / "out"
    given = ["--model", settings.model.name_or_path, "--data", settings.data, "--out", str(out), "--device", "cpu"]
    given += ["--precision", "32-true", "--warm_up", "1", "--steps", "2", "--counted_steps", "1"]
    given += ["--variants", "dpo", "--parity", "2", "--set", "model.consistency.mlc.temperature=0.4"]
    assert train_step.main(given) == 1
    shown = capsys.readouterr().out
    assert "losses of published and dpo_mlc in float32 DISAGREE" in shown
    assert "no ratio is stated" in shown
    report = json.loads((out / "train_step.json").read_text())
    assert report["targets"] is None
    assert report["parity"]["holds"] is False
    assert len(report["parity"]["published"]) == 2
    assert not (out / "train_step.png").exists()
    # The measurements are written nevertheless.
    (row,) = csv.DictReader((out / "train_step.csv").open())
    assert row["variant"] == "dpo"
    assert 0 < float(row["seconds_p20"]) <= float(row["seconds"]) <= float(row["seconds_p80"])
    # A new process, which does not inherit the memory of this one.
    assert 2e8 < float(row["bytes_before"]) <= float(row["peak_bytes"]) < 2e9
    assert len(report["steps"]["dpo"]["seconds"]) == 3
    assert len(report["counts"]["dpo"]) == 1
    assert (out / "logs" / "dpo.log").stat().st_size > 0


def test_what_is_written(tmp_path: Path) -> None:
    names = {"published": PUBLISHED, "dpo": DPO, "dpo_mlc": OURS, "trl": VariantMeasurements(failure="not installed")}
    results = [result(name, m, [[]] * 4) for name, m in names.items() if not m.failure]
    shown = {"name": "tiny", "batch_size": 1, "languages": ["en", "sw"], "precision": "32-true"}
    paths = write(tmp_path, CPU, shown, names, results, Parity([0.5], [0.5]), targets(names))
    report = json.loads(paths[0].read_text())
    assert torch.__version__.startswith(report["environment"]["torch"])  # without the suffix of the build
    assert [target["met"] for target in report["targets"]] == [True, True, True, None, None]
    assert report["parity"] == {"published": [0.5], "dpo_mlc": [0.5], "largest_difference": 0.0, "holds": True}
    assert report["failures"] == {"trl": "not installed"}
    rows = list(csv.DictReader(paths[1].open()))
    assert [float(row["seconds"]) for row in rows] == [10.0, 2.0, 5.0]
    assert paths[2].stat().st_size > 10_000


def test_gpu_command_runs_it_with_options_that_are_right() -> None:
    (arguments,) = [arguments for name, arguments, _ in gpu.COMMANDS if name == "train-step"]
    assert arguments[:2] == ("-m", "benchmarks.train_step")
    options = train_step.parse(arguments[2:])
    train_step.check(options)
    assert options.architecture == "qwen2.5-0.5b"
