"""Whole runs through the command line, on a tiny model."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import columns, example_rows, labelled_rows, save_model, translated_rows, write_jsonl
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from lightning_mlc.cli import main
from lightning_mlc.commands.training import TrainingCLI, run
from lightning_mlc.errors import UserError


def arguments(command: str, model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = {
        "out": out,
        "model.name_or_path": model,
        "data.train_path": data,
        "data.val_share": 0.25,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 3,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    given = [item for name, value in options.items() for item in (f"--{name}", str(value))]
    return [command, *given, *more]


LEARNS = ["--model.optimizer=AdamW", "--model.optimizer.lr=1e-2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a data file and the folder of a finished DPO + MLC run."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_model(folder / "model")
    data = write_jsonl(folder / "pairs.jsonl", example_rows(12))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(arguments("fit", model, data, folder / "out", *LEARNS))
    summary = json.loads((folder / "out" / "report" / "summary.json").read_text())
    # The peak of this process, which never decreases. Linux counts in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    assert held * unit <= summary["peak_memory_bytes"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return model, data, folder / "out"


def test_fit_writes_what_it_says(finished: tuple[Path, Path, Path]) -> None:
    _, _, out = finished
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {
        "config.yaml",
        "metrics.csv",
        "checkpoints/step=3.ckpt",
        "checkpoints/last.ckpt",
        "report/validation.csv",
        "report/languages.png",
        "report/cosines.png",
        "report/summary.json",
    }
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["steps"] == summary["validated_at_step"] == 3
    assert summary["languages"] == ["en", "sw", "zh"]
    before, after = summary["before"], summary["after"]
    # Before training the policy is its own reference.
    assert all(before[f"val/rewards/margins/{language}"] == 0 for language in ("en", "sw", "zh"))
    assert before["val/rewards/accuracies/worst"] == 0.5
    assert before["val/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert after["val/loss"] != before["val/loss"]
    assert {f"val/mlc/{kind}/min_cosine" for kind in ("raw", "extracted")} <= after.keys()


def test_fit_logs_the_names_that_users_know(finished: tuple[Path, Path, Path]) -> None:
    logged = columns(finished[2])
    names = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"]
    names += ["logps/rejected", "loss", "objective/loss", "mlc/loss", "mlc/excess", "mlc/explained_variance"]
    names += ["mlc/min_cosine", "mlc/raw/explained_variance", "mlc/raw/min_cosine"]
    for name in names:
        assert len(logged[f"train/{name}"]) == 3, name
    for step in range(3):
        total = logged["train/objective/loss"][step] + 0.8 * logged["train/mlc/loss"][step]
        assert logged["train/loss"][step] == pytest.approx(total, rel=1e-5)
        margin = logged["train/rewards/chosen"][step] - logged["train/rewards/rejected"][step]
        assert logged["train/rewards/margins"][step] == pytest.approx(margin, abs=1e-6)
    assert logged["train/objective/loss"][0] == pytest.approx(math.log(2), rel=1e-5)


def test_a_run_without_validation_still_says_what_it_wrote(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    run(arguments("fit", tiny_model, pairs_file, tmp_path / "out", "--data.val_share=0"))
    shown = capsys.readouterr().out
    assert f"wrote\n  {tmp_path / 'out' / 'checkpoints' / 'last.ckpt'}\nnext\n  lightning-mlc export" in shown
    assert not (tmp_path / "out" / "report").exists()
    assert not [str(one.message) for one in recwarn if issubclass(one.category, UserWarning)]  # nothing is wrong


def test_training_lowers_both_losses(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    more = ["--model.optimizer=AdamW", "--model.optimizer.lr=3e-3", "--data.val_share=0", "--data.batch_size=4"]
    run(arguments("fit", tiny_model, pairs_file, tmp_path / "out", *more, "--trainer.max_steps=30"))
    logged = columns(tmp_path / "out")
    assert logged["train/objective/loss"][-1] < 0.2
    assert logged["train/mlc/excess"][-1] < 0.3 * logged["train/mlc/excess"][0]


def logits(model: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([list(text.encode())])).logits
    return found


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_gives_bitwise_the_same_logits(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, lora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.optimizer=AdamW", "--model.optimizer.lr=1e-2"]
    more += ["--model.lora.r=4", "--model.lora.alpha=8"] if lora else []
    cli = run(arguments("fit", tiny_model, pairs_file, tmp_path / "out", *more))
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "hf")]) == 0
    assert "wrote" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    policy = cli.model.policy
    trained = (policy.model.merge_and_unload() if lora else policy.model).eval()
    assert torch.equal(logits(exported, "How do I"), logits(trained, "How do I"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.equal(logits(exported, "How do I"), logits(base, "How do I"))
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id is not None
    if lora:  # the frozen weights are not stored
        saved = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all("lora" in key or key.startswith("representation") for key in saved)


def test_export_of_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ckpt").write_text("no")
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    for name, message in (("none", "no file"), ("a", "not a checkpoint"), ("b", "not a checkpoint of lightning-mlc")):
        assert main(["export", "--ckpt_path", str(tmp_path / f"{name}.ckpt"), "--out", str(tmp_path / "hf")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "hf").exists()


def test_export_never_overwrites(finished: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, data, out = finished
    assert main(["export", "--ckpt_path", str(out / "checkpoints/last.ckpt"), "--out", str(data.parent)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_sft(tiny_model: Path, tmp_path: Path) -> None:
    """Instruction data. The same rows as pairs give the same run, because SFT leaves the rejected response out."""
    runs = {}
    for pairs in (False, True):
        data = write_jsonl(tmp_path / f"{pairs}.jsonl", example_rows(12, pairs=pairs))
        out = tmp_path / f"out-{pairs}"
        run(arguments("fit", tiny_model, data, out, "--model.objective=SFT", "--data.batch_size=2"))
        runs[pairs] = columns(out)
        assert "val/nll/sw" in runs[pairs]
        assert not any("rewards" in name for name in runs[pairs])
    assert runs[True] == runs[False]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        slow(["--model.objective=KTO"], {"kl"}),
        slow(["--model.objective=ORPO"], {"nll_loss", "log_odds_ratio", "log_odds_chosen"}),
        slow(["--model.objective=SimPO", "--model.objective.gamma=0.3"], set()),
        slow(["--model.objective=CPO"], {"nll_loss"}),
        slow(["--model.objective=KTO", "--model.objective.loss=apo_zero_unpaired"], set()),
        slow(["--model.objective.loss=ipo", "--model.objective.rpo_alpha=0.5"], {"nll_loss"}),
        slow(["--model.objective.loss=robust", "--model.objective.label_smoothing=0.1"], set()),
        slow(
            [
                "--model.objective=Sum",
                '--model.objective.objectives=[{"class_path": "DPO"}, {"class_path": "SFT"}]',
                "--model.objective.weights=[1, 0.5]",
            ],
            set(),
        ),
    ],
    ids=lambda value: value[0].split("=")[-1] if isinstance(value, list) else "",
)
def test_every_objective_with_mlc(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, objective: list[str], names: set[str]
) -> None:
    out = tmp_path / "out"
    more = ["--model.optimizer=AdamW", "--model.optimizer.lr=3e-3", "--data.batch_size=4", "--data.val_share=0.25"]
    run(arguments("fit", tiny_model, pairs_file, out, *objective, *more, "--trainer.max_steps=12"))
    logged = columns(out)
    common = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    assert {f"train/{name}" for name in common | names | {"mlc/loss"}} <= logged.keys()
    assert logged["train/objective/loss"][-1] < logged["train/objective/loss"][0]
    assert logged["train/rewards/margins"][-1] > logged["train/rewards/margins"][0]
    assert logged["val/loss"][-1] < logged["val/loss"][0]


@pytest.mark.slow
def test_labelled_responses(tiny_model: Path, tmp_path: Path) -> None:
    """Rewards of desirable and undesirable responses in every language, and no metric that needs pairs."""
    data = write_jsonl(tmp_path / "a.jsonl", labelled_rows(16))
    out = tmp_path / "out"
    more = ["--model.objective=KTO", "--model.optimizer=AdamW", "--model.optimizer.lr=3e-3", "--data.batch_size=4"]
    run(arguments("fit", tiny_model, data, out, *more, "--trainer.max_steps=12"))
    logged = columns(out)
    assert {f"train/{name}" for name in ("kl", "logps/chosen", "logps/rejected", "mlc/loss")} <= logged.keys()
    assert not any("accuracies" in name for name in logged)
    assert logged["train/rewards/margins"][-1] > 0.1
    assert logged["train/objective/loss"][0] == pytest.approx(0.5)  # every response as likely as under the reference
    assert logged["val/loss"][-1] < logged["val/loss"][0] == pytest.approx(0.5)
    for language in ("en", "sw", "zh"):
        before, after = (
            [logged[f"val/rewards/{name}/{language}"][place] for name in ("chosen", "rejected", "margins")]
            for place in (0, -1)
        )
        assert before == [0, 0, 0]
        assert after[2] == pytest.approx(after[0] - after[1])
        assert after[2] > 0
    margins = [logged[f"val/rewards/margins/{language}"][-1] for language in ("en", "sw", "zh")]
    assert logged["val/rewards/margins/worst"][-1] == min(margins)
    assert logged["val/rewards/margins/mean"][-1] == pytest.approx(sum(margins) / 3)
    table = (out / "report" / "validation.csv").read_text()
    assert "val/rewards/rejected/sw" in table
    assert "val/nll/sw" in table


def test_a_step_of_one_kind_logs_no_zero_for_the_other(tiny_model: Path, tmp_path: Path) -> None:
    """As with every value that a step lacks, the latest one is repeated."""
    rows = [row for row in labelled_rows(9) if not row["label"]] + labelled_rows(1)
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    more = ["--model.objective=KTO", "--data.val_share=0", "--trainer.max_steps=4"]
    run(arguments("fit", tiny_model, data, tmp_path / "out", *more))
    logged = columns(tmp_path / "out")
    assert len(set(logged["train/logps/chosen"])) == 1
    assert len(set(logged["train/logps/rejected"])) == 3
    assert max(logged["train/logps/chosen"]) < -10
    assert "train/rewards/margins" not in logged


@pytest.mark.slow
def test_resumed_run_continues_and_explicit_options_win(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    options = ["--model.optimizer=AdamW", "--data.batch_size=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rate = "--model.optimizer.lr=1e-3"
    run(arguments("fit", tiny_model, pairs_file, whole, *options, rate, "--trainer.max_steps=9"))
    # Stopped at the end of its first epoch (9 training rows, 5 micro-batches).
    run(arguments("fit", tiny_model, pairs_file, parts, *options, rate, "--trainer.max_steps=5"))
    run(arguments("fit", tiny_model, pairs_file, parts, *options, rate, "--trainer.max_steps=9", "--ckpt_path=last"))
    summaries = [json.loads((out / "report/summary.json").read_text()) for out in (whole, parts)]
    assert summaries[0]["before"] == summaries[1]["before"]  # not measured again after training
    assert summaries[0]["after"] == pytest.approx(summaries[1]["after"], rel=1e-4, abs=1e-5)
    # The checkpoint's options do not override the command line.
    cli = run(
        arguments(
            "validate", tiny_model, pairs_file, parts, "--ckpt_path=last", "--model.consistency.mlc.temperature=0.5"
        )
    )
    assert cli.model.consistency.mlc.temperature == 0.5
    lower = arguments("fit", tiny_model, pairs_file, tmp_path / "lower", *options, "--model.optimizer.lr=1e-4")
    checkpoint = parts / "checkpoints/last.ckpt"
    resumed = run([*lower, "--trainer.max_steps=10", f"--ckpt_path={checkpoint}"])
    assert resumed.trainer.global_step == 10


@pytest.mark.slow
@pytest.mark.parametrize("others", [("fr", "de"), ("fr",)], ids=["as many", "fewer"])
def test_a_run_that_goes_on_in_other_languages_does_not_compare_them(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], others: tuple[str, ...]
) -> None:
    """Swahili before training is no value of French. Between two epochs, the data may change."""
    rows = example_rows(8)
    translated = [
        {**row, "prompt": dict(zip(("en", *others), row["prompt"].values(), strict=False))} for row in example_rows(8)
    ]
    first, second = (write_jsonl(tmp_path / f"{i}.jsonl", data) for i, data in enumerate((rows, translated)))
    more = ("--data.val_share=0.5", "--data.batch_size=2")
    run(arguments("fit", tiny_model, first, tmp_path / "a", *more, "--trainer.max_steps=2"))
    capsys.readouterr()
    last = f"--ckpt_path={tmp_path / 'a' / 'checkpoints' / 'last.ckpt'}"
    run(arguments("fit", tiny_model, second, tmp_path / "b", *more, "--trainer.max_steps=4", last))
    assert "no values before training: those of the checkpoint are of other languages" in capsys.readouterr().out
    summary = json.loads((tmp_path / "b" / "report" / "summary.json").read_text())
    assert summary["before"] is summary["cosines_before"] is None
    assert summary["languages"] == ["en", *others]
    assert "val/nll/fr" in summary["after"]


def test_a_run_by_tokens_resumes_in_the_middle_of_an_epoch(tiny_model: Path, tmp_path: Path) -> None:
    rows = example_rows(24)
    for number, row in enumerate(rows):
        row["chosen"] += " Really." * (number % 7)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = ["--data.tokens_per_batch=1000", "--trainer.accumulate_grad_batches=2", "--model.optimizer.lr=1e-3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def fit(out: Path, steps: int, *more: str) -> TrainingCLI:
        optimizer = ["--model.optimizer=AdamW", *options]
        return run(arguments("fit", tiny_model, data, out, *optimizer, f"--trainer.max_steps={steps}", *more))

    cli = fit(whole, 8)
    assert cli.trainer.estimated_stepping_batches == 8
    micro_batches = int(cli.trainer.num_training_batches)
    assert micro_batches % 2 == 0  # whole steps
    assert 8 % (micro_batches // 2) != 0  # no run ends with an epoch
    fit(parts, 5)
    assert 5 % (micro_batches // 2) != 0
    fit(parts, 8, "--ckpt_path=last")
    summaries = [json.loads((out / "report/summary.json").read_text()) for out in (whole, parts)]
    assert summaries[0]["after"] == pytest.approx(summaries[1]["after"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (labelled_rows(16), ["--model.objective=KTO"]),
        (translated_rows(16), ["--model.consistency.dco.weight=1"]),
        (example_rows(16), ["--model.objective=null"]),
    ],
    ids=["mismatched responses", "responses in every language", "no responses"],
)
@pytest.mark.slow
def test_a_budget_holds_whatever_is_run(
    tiny_model: Path, tmp_path: Path, rows: list[dict[str, Any]], more: list[str]
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    cli = run(arguments("fit", tiny_model, data, tmp_path / "out", *more, "--data.tokens_per_batch=1000"))
    assert cli.trainer.global_step == 3
    for batch in cli.datamodule.train_dataloader():
        blocks = [*batch.responses, *batch.translations, *batch.prompts]
        assert 0 < sum(block.num_tokens for block in blocks) <= 1000


def test_validate_reproduces_the_last_validation(finished: tuple[Path, Path, Path]) -> None:
    model, data, out = finished
    cli = run(arguments("validate", model, data, out, "--ckpt_path=last"))
    after = json.loads((out / "report/summary.json").read_text())["after"]
    assert cli.model.validation_results == pytest.approx(after, rel=1e-5, abs=1e-6)


def test_test_and_predict(finished: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, data, out = finished
    checkpoint = f"--ckpt_path={out / 'checkpoints/last.ckpt'}"
    cli = run(arguments("test", model, data, tmp_path, checkpoint, f"--data.test_path={data}"))
    assert cli.model.validation_results["test/rewards/accuracies/sw"] >= 0
    run(arguments("predict", model, data, tmp_path, checkpoint, "--model.max_new_tokens=4"))
    records = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == 3 * 3  # validation rows x languages
    assert {record["language"] for record in records} == {"en", "sw", "zh"}
    assert all(isinstance(record["response"], str) for record in records)
    with pytest.raises(UserError, match=r"^out: .*predictions\.jsonl exists"):
        run(arguments("predict", model, data, tmp_path, checkpoint))
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == len(records)


def test_a_prediction_that_fails_at_once_leaves_nothing(
    finished: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(self: Any, **_keywords: Any) -> Any:
        raise ValueError("no cache for it\nand more")

    monkeypatch.setattr(LlamaForCausalLM, "generate", cannot)
    with pytest.raises(UserError, match=r"^model\.name_or_path: .* \(ValueError: no cache for it\); export it"):
        run(arguments("predict", finished[0], finished[1], tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_run_of_steps_ends_with_a_validation_of_its_last(finished: tuple[Path, Path, Path]) -> None:
    """3 steps end in the middle of the first epoch of 9, where Lightning alone would not validate."""
    logged = columns(finished[2])
    assert len(logged["val/loss"]) == 2  # before the first step and after the last one


class Interrupt(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            raise RuntimeError("the machine is gone")


def test_a_run_that_dies_goes_on_from_its_last_checkpoint(finished: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, data, whole = finished
    given = arguments("fit", model, data, tmp_path / "out", *LEARNS)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run([*given, f"--trainer.callbacks+={Interrupt.__module__}.Interrupt"])
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    # The run can also be resumed from its end, as if nothing had happened.
    cli = run([*given, "--ckpt_path=last"])
    assert cli.trainer.global_step == 3
    assert columns(tmp_path / "out") == columns(whole)


def test_nan_names_the_batch(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(
        "fit", tiny_model, pairs_file, tmp_path / "out", "--model.optimizer=SGD", "--model.optimizer.lr=1e30"
    )
    assert main(args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: the loss is nan at step [12] \(batch of r\d+\)", error)


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(args) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_options_that_cannot_work_together(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    single = write_jsonl(tmp_path / "single.jsonl", example_rows(4, pairs=False))
    labelled = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(4))
    english = write_jsonl(tmp_path / "en.jsonl", [r | {"prompt": {"en": r["prompt"]["en"]}} for r in example_rows(4)])
    no_template = save_model(tmp_path / "plain", template=None)
    alike = write_jsonl(
        tmp_path / "alike.jsonl", [row | {"prompt": {"en": "a", "sw": "b"}} for row in labelled_rows(4)]
    )
    parts = ["--model.objective=Sum", "--model.objective.objectives"]
    no_weights = save_model(tmp_path / "empty")  # found when a model is loaded, and not before
    (no_weights / "model.safetensors").unlink()
    fused = ["--model.optimizer=AdamW", "--model.optimizer.fused=true", "--trainer.gradient_clip_val=1"]
    key = "--model.consistency"
    sft, null, off = ["--model.objective=SFT"], ["--model.objective=null"], [f"{key}.mlc.weight=0"]
    cases: list[tuple[Path, Path, list[str], str]] = [
        (tiny_model, single, [], "DPO needs chosen and rejected responses"),
        (tiny_model, english, [], "model.consistency.mlc: needs prompts in two or more languages"),
        (tiny_model, single, [*sft, f"{key}.mpo.weight=1"], "consistency.mpo: needs chosen and rejected responses"),
        (tiny_model, single, [*sft, f"{key}.dco.weight=1"], "consistency.dco: needs chosen and rejected responses"),
        (tiny_model, english, [*off, f"{key}.mpo.weight=1"], "consistency.mpo: needs prompts in two or more"),
        (tiny_model, english, [*off, f"{key}.dco.weight=1"], "consistency.dco: needs prompts in two or more"),
        (tiny_model, english, [*off, f"{key}.source_cosine.weight=1"], "consistency.source_cosine: needs prompts in"),
        (tiny_model, pairs_file, [f"{key}.contrast.weight=1"], "data.batch_size: is 1, but model.consistency.contrast"),
        (tiny_model, pairs_file, [f"{key}.mlc.rows=ordinary"], "mlc.rows: is ordinary, but the training data has no"),
        (tiny_model, pairs_file, [f"{key}.retain.weight=1"], "retain.rows: is ordinary, but the training data has no"),
        (tiny_model, pairs_file, [f"{key}.mpo.beta=-1"], "model.consistency.mpo.beta: must be 0.01 or above"),
        (tiny_model, pairs_file, [*null, *off], "model.objective: is null, and no term of model.consistency is on"),
        (
            tiny_model,
            pairs_file,
            [*null, f"{key}.every_n_steps=2"],
            "model.consistency.every_n_steps: the steps between",
        ),
        (no_template, pairs_file, [], "has no chat template"),
        (tmp_path / "none", pairs_file, [], "there is no folder"),
        (tiny_model, pairs_file, ["--model.consistency.layer=9"], "the model has no layer 9; it has 3 layers"),
        (
            tiny_model,
            pairs_file,
            ["--model.consistency.mlc.temperature=-1"],
            "model.consistency.mlc.temperature: must be from",
        ),
        (tiny_model, pairs_file, ["--model.objective.beta=-1"], "model.objective.beta: must be above 0"),
        (tiny_model, pairs_file, ["--model.objective.loss=robust"], "model.objective.label_smoothing: the loss robust"),
        (tiny_model, single, ["--model.objective=ORPO"], "model.objective: ORPO needs chosen and rejected responses"),
        (tiny_model, single, ["--model.objective=KTO"], "model.objective: KTO needs chosen and rejected responses, or"),
        (tiny_model, labelled, [], "model.objective: DPO needs a chosen and a rejected response to every prompt"),
        (
            tiny_model,
            alike,
            ["--model.objective=KTO", "--data.val_share=0"],
            "data.train_path: each row needs another one",
        ),
        (
            tiny_model,
            pairs_file,
            [*parts, '[{"class_path": "SFT"}, {"class_path": "DPO", "init_args": {"beta": -1}}]'],
            "model.objective.objectives[1].beta: must be above 0, got -1.0",
        ),
        (
            tiny_model,
            pairs_file,
            [
                *parts,
                '[{"class_path": "Sum", "init_args": {"objectives": [{"class_path": "SFT"}], "weights": [1, 2]}}]',
            ],
            "model.objective.objectives[0].weights: 2 given for 1 objectives",
        ),
        (
            tiny_model,
            labelled,
            [*parts, '[{"class_path": "KTO"}, {"class_path": "ORPO"}]'],
            "model.objective.objectives[1]: ORPO needs a chosen and a rejected response",
        ),
        (tiny_model, pairs_file, ["--trainer.precision=bf16-mixed", *fused], "model.optimizer.fused: Lightning cannot"),
        (tiny_model, pairs_file, ["--trainer.overfit_batches=1"], "trainer.overfit_batches: is not supported"),
        (tiny_model, pairs_file, ["--data.batch_size=2", "--data.tokens_per_batch=9"], "data.tokens_per_batch: cannot"),
        (no_weights, pairs_file, ["--data.tokens_per_batch=9"], "data.tokens_per_batch: 9 is less than the"),
        (tiny_model, pairs_file, ["--model.lora.target_modules=nothing"], "model.lora.target_modules:"),
        (tiny_model, pairs_file, ["--model.lora.r=0"], "error: model.lora.r: the rank must be at least 1"),
        (tiny_model, pairs_file, ["--seed_everything=true"], "seed_everything: give a number"),
        (tiny_model, pairs_file, ["--ckpt_path=gone.ckpt"], "ckpt_path: there is no file gone.ckpt"),
        (tiny_model, pairs_file, ["--ckpt_path=last"], "ckpt_path: there is no checkpoint in"),
    ]
    for model, data, more, message in cases:
        assert message in refused(arguments("fit", model, data, out, *more), capsys), message
        assert not (out / "config.yaml").exists(), message


def test_an_out_folder_that_exists(finished: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, data, out = finished
    before = sorted(path.stat().st_mtime_ns for path in out.rglob("*"))
    assert "exists and is not an empty folder" in refused(arguments("fit", model, data, out), capsys)
    assert sorted(path.stat().st_mtime_ns for path in out.rglob("*")) == before


def test_a_checkpoint_of_another_model(
    finished: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, data, out = finished
    other = save_model(tmp_path / "other", num_hidden_layers=2)
    checkpoint = f"--ckpt_path={out / 'checkpoints/last.ckpt'}"
    message = refused(arguments("validate", other, data, tmp_path / "out", checkpoint), capsys)
    assert "the checkpoint is of another model: its num_hidden_layers is 3" in message
    message = refused(
        arguments("validate", finished[0], data, tmp_path / "out", checkpoint, "--model.consistency.mlc.weight=0"),
        capsys,
    )
    assert "the checkpoint has representation.extractor.bias" in message
    message = refused(
        arguments("validate", finished[0], data, tmp_path / "out", checkpoint, "--model.lora.r=2"), capsys
    )
    assert "trained with model.lora None" in message


def test_config_is_complete_and_repeats_the_run(finished: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, _, out = finished
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"]["consistency"]["mlc"]["temperature"] == 0.2
    run(["fit", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "again")])
    assert columns(tmp_path / "again") == columns(out)


def test_fast_dev_run_writes_nothing(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    cli = run(arguments("fit", tiny_model, pairs_file, tmp_path / "out", "--trainer.fast_dev_run=true"))
    assert isinstance(cli, TrainingCLI)
    assert [path.name for path in tmp_path.rglob("*")] == ["pairs.jsonl"]


@pytest.mark.parametrize("more", [["--trainer.precision=bf16-true"], slow(["--model.gradient_checkpointing=true"])])
def test_other_ways_to_run(tiny_model: Path, pairs_file: Path, tmp_path: Path, more: list[str]) -> None:
    cli = run(arguments("fit", tiny_model, pairs_file, tmp_path / "out", *more))
    dtype = torch.bfloat16 if "bf16-true" in more[0] else torch.float32
    assert cli.model.policy.model.dtype == dtype
    assert cli.model.policy.training


PEERS = {
    "pairwise_cosine": ({"loss"}, "30"),
    "source_cosine": ({"loss"}, "30"),
    "mpo": ({"loss", "gap", "constraint"}, "1"),
    "dco": ({"loss", "agreement"}, "0.01"),
}


@pytest.mark.parametrize("objective", [slow("DPO"), "null"])
@pytest.mark.parametrize("term", ["pairwise_cosine", *map(slow, ("source_cosine", "mpo", "dco"))])
def test_every_peer_of_mlc(tiny_model: Path, tmp_path: Path, term: str, objective: str) -> None:
    """Through the command: the term is in the total with its weight, and decreases if nothing works against it."""
    names, weight = PEERS[term]
    data = write_jsonl(tmp_path / "pairs.jsonl", translated_rows(12))
    out = tmp_path / "out"
    more = ["--model.consistency.mlc.weight=0", f"--model.consistency.{term}.weight={weight}"]
    more += ["--model.optimizer=AdamW", "--model.optimizer.lr=1e-4", "--data.batch_size=9", "--trainer.max_steps=12"]
    more += ["--trainer.check_val_every_n_epoch=12"]
    cli = run(arguments("fit", tiny_model, data, out, f"--model.objective={objective}", *more))
    logged = columns(out)
    assert {name.removeprefix(f"train/{term}/") for name in logged if name.startswith(f"train/{term}/")} == names
    for step, total in enumerate(logged["train/loss"]):
        alone = 0.0 if objective == "null" else logged["train/objective/loss"][step]
        assert total == pytest.approx(alone + float(weight) * logged[f"train/{term}/loss"][step], rel=1e-5)
    if objective == "null":
        for split in ("train", "val"):
            assert logged[f"{split}/{term}/loss"][-1] < 0.96 * logged[f"{split}/{term}/loss"][0]
    assert ("train/mlc/raw/min_cosine" in logged) is term.endswith("cosine")  # so it can be compared with MLC
    assert "train/mlc/loss" not in logged
    assert ("val/loss" in logged) is ("train/objective/loss" in logged) is (objective != "null")
    assert (cli.model.representation is not None) is term.endswith("cosine")
    assert "val/nll/sw" in logged
    # Measured by the objective's rewards, or by MPO's reward gap; in languages whose responses are run.
    assert ("val/rewards/margins/sw" in logged) is (objective != "null" or not term.endswith("cosine"))
    assert not any(math.isnan(value) for values in logged.values() for value in values)


def test_mpo_against_the_model_itself(tiny_model: Path, tmp_path: Path) -> None:
    """Before the first step the policy equals its reference, so only the difference of gaps per token remains."""
    rows = translated_rows(1)
    del rows[0]["prompt"]["zh"], rows[0]["chosen"]["zh"], rows[0]["rejected"]["zh"]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    more = ["--model.objective=null", "--model.consistency.mlc.weight=0", "--model.consistency.mpo.weight=2"]
    more += ["--model.consistency.mpo.beta=1.5", "--data.val_share=0", "--trainer.max_steps=1"]
    run(arguments("fit", tiny_model, data, tmp_path / "out", *more))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)

    def mean_logp(prompt: str, response: str) -> float:
        before = tokenizer(f"<|user|>{prompt}<|end|>\n<|assistant|>", add_special_tokens=False).input_ids
        after = tokenizer(f"{response}<|end|>", add_special_tokens=False).input_ids
        with torch.no_grad():
            found = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        logps = [float(found[len(before) - 1 + place, token]) for place, token in enumerate(after)]
        return sum(logps) / len(logps)

    gaps = {
        language: mean_logp(rows[0]["prompt"][language], rows[0]["chosen"][language])
        - mean_logp(rows[0]["prompt"][language], rows[0]["rejected"][language])
        for language in ("en", "sw")
    }
    logged = columns(tmp_path / "out")
    expected = (1.5 * gaps["sw"] - gaps["en"]) ** 2
    assert logged["train/mpo/loss"] == [pytest.approx(expected, rel=1e-3)]
    assert logged["train/loss"] == [pytest.approx(2 * expected, rel=1e-3)]
    assert logged["train/mpo/constraint"] == [0.0]
    assert logged["train/rewards/margins"] == [pytest.approx(gaps["en"], rel=1e-3)]


@pytest.mark.slow
def test_responses_in_every_language_are_measured_alike_whichever_term_is_on(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", translated_rows(8))
    before = []
    for weight in (0, 1):
        out = tmp_path / f"out-{weight}"
        run(
            arguments("fit", tiny_model, data, out, f"--model.consistency.mpo.weight={weight}", "--trainer.max_steps=1")
        )
        before.append(json.loads((out / "report/summary.json").read_text())["before"])
    shared = before[0].keys() & before[1].keys()
    assert "val/nll/sw" in shared
    assert before[1].keys() - shared == {"val/mpo/loss"}
    for name in shared:
        assert before[0][name] == pytest.approx(before[1][name], rel=1e-5, abs=1e-6), name
