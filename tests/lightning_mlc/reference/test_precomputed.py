"""Runs with precomputed scores: they are correct, computed once, and found again after any interruption."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, columns, example_rows, labelled_rows, save_model, write_jsonl
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_mlc.commands.training import run
from lightning_mlc.consistency import MLC, Consistency
from lightning_mlc.data import datamodule as datamodule_module
from lightning_mlc.data import scoring
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.rows import KINDS
from lightning_mlc.errors import UserError
from lightning_mlc.models.lora import LoRA
from lightning_mlc.models.policy import Policy
from lightning_mlc.objectives import DPO
from lightning_mlc.reference import OnlineReference, PrecomputedReference, ReferenceSettings
from lightning_mlc.reference import precomputed as precomputed_module
from lightning_mlc.reference.scores import ReferenceScores
from lightning_mlc.training.module import AlignmentModule

PRECOMPUTED = ReferenceSettings("precomputed")


def ragged_rows(count: int = 13) -> list[dict[str, Any]]:
    rows = example_rows(count)
    for number, row in enumerate(rows):
        row["chosen"] += " Really." * (number % 5)
        if number % 4 == 1:
            row["prompt"]["zh"] = None
    return rows


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", ragged_rows())


def data_of(model: Path, file: Path, **options: Any) -> MultilingualData:
    cache = file.parent / "cache"
    defaults = {"val_share": 0.3, "batch_size": 2, "name_or_path": str(model), "cache_dir": str(cache)}
    return MultilingualData(str(file), **defaults | options)


def trainer_of(**options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": 2,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**defaults | options)


def fit(
    model: Path,
    file: Path,
    reference: ReferenceSettings = PRECOMPUTED,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **module: Any,
) -> AlignmentModule:
    torch.manual_seed(0)
    found = AlignmentModule(str(model), DPO(), Consistency(mlc=MLC(weight=0.0)), reference, **module)
    trainer_of(**trainer or {}).fit(found, data_of(model, file, **data or {}))
    return found


def tables(module: AlignmentModule) -> dict[str, ReferenceScores]:
    assert isinstance(module._reference, PrecomputedReference)
    return module._reference._scores


def shards(file: Path) -> set[str]:
    return {path.name for path in (file.parent / "cache" / "reference").rglob("*.safetensors")}


def count_batches(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> list[int]:
    """Records the sizes of batches in passes from here on. After ``fail_after`` batches the data loader fails."""
    sizes: list[int] = []
    for name in ("source_responses", "evaluation"):
        original = getattr(datamodule_module.Collator, name)

        def counting(self: Any, examples: Any, *more: Any, original: Any = original) -> Any:
            if fail_after is not None and len(sizes) == fail_after:
                raise OSError("the disk is gone")
            return original(self, examples, *more)

        monkeypatch.setattr(datamodule_module.Collator, name, counting)
    run_batch = precomputed_module.run_batch

    def counted(policy: Policy, batch: Any, *more: Any) -> Any:
        sizes.append(len(batch))
        return run_batch(policy, batch, *more)

    monkeypatch.setattr(precomputed_module, "run_batch", counted)
    return sizes


# ---- the scores ----------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_forward_pass(tiny_model: Path, data_file: Path) -> None:
    """Each response alone and without padding through ``transformers``: the sum of its tokens' log-probabilities."""
    module = fit(tiny_model, data_file)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    data = data_of(tiny_model, data_file)
    data.setup("fit")
    table = data._tables["train"]
    for split, languages in (("train", 1), ("val", 3)):
        scores = tables(module)[split]
        assert scores.keys.tolist() == data.keys(split)
        assert scores.logps.shape == (len(scores.keys), languages, KINDS)
        for row, key in enumerate(scores.keys.tolist()):
            example = table[key]
            for language in range(languages):
                for kind, name in enumerate(("chosen", "rejected")):
                    response = example[name]
                    if language not in example["languages"]:
                        assert scores.tokens[row, language, kind] == 0
                        continue
                    prompt = example["prompts"][example["languages"].index(language)]
                    with torch.no_grad():
                        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
                    expected = sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(response))
                    assert scores.tokens[row, language, kind] == len(response)
                    # float32: products in blocks of other shapes, and sums of about a hundred terms in another order.
                    torch.testing.assert_close(scores.logps[row, language, kind], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_before_training_every_margin_is_exactly_zero(tiny_model: Path, data_file: Path, precision: str) -> None:
    """Validation rows are scored in the batches of validation, bitwise, because ties would otherwise look like
    preferences."""
    module = AlignmentModule(str(tiny_model), DPO(), Consistency(mlc=MLC(weight=0.0)), PRECOMPUTED)
    data = data_of(tiny_model, data_file, val_share=0.9, val_batch_size=3)
    trainer_of(precision=precision).validate(module, data, verbose=False)
    margins = {key: value for key, value in module.validation_results.items() if "rewards/margins" in key}
    assert margins
    assert set(margins.values()) == {0.0}
    assert module.validation_results["val/rewards/accuracies/worst"] == 0.5


def cli(command: str, model: Path, file: Path, out: Path, *more: str) -> Any:
    options = {
        "out": out,
        "model.name_or_path": model,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 0.1,
        "data.train_path": file,
        "data.val_share": 0.3,
        "data.batch_size": 2,
        "data.cache_dir": file.parent / "cache",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    return run([command, *(f"--{name}={value}" for name, value in options.items()), *more])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--model.lora.r=4"],
        ["--model.objective=KTO", "--model.consistency.mpo.weight=1", "--model.consistency.mpo.constraint=0"],
        ["--model.objective=null", "--model.consistency.dco.weight=1", "--model.optimizer.lr=1e-3"],
    ],
    ids=["weights", "adapters", "mismatched responses", "responses in all languages"],
)
def test_training_is_the_same_as_with_the_model_at_hand(
    tiny_model: Path, data_file: Path, tmp_path: Path, more: list[str]
) -> None:
    for mode in ("online", "precomputed"):
        options = [f"--model.reference.mode={mode}", "--trainer.max_steps=8", *more]  # into the second epoch
        cli("fit", tiny_model, data_file, tmp_path / mode, *options)
    online, precomputed = columns(tmp_path / "online"), columns(tmp_path / "precomputed")
    assert online.keys() == precomputed.keys()
    assert len(online["train/loss"]) == 8
    for name, values in online.items():
        # float32: the pass runs examples in other groups, so sums differ in their last bits, and steps carry that on.
        assert precomputed[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    if "train/rewards/margins" in online:
        assert abs(online["train/rewards/margins"][-1]) > 1e-3  # otherwise there would be nothing to compare


@pytest.mark.slow
def test_training_on_labelled_responses_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """The pass also scores KTO's responses to other prompts. Without them, other scores are needed."""
    file = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(13))
    for mode in ("online", "precomputed"):
        options = ["--model.objective=KTO", f"--model.reference.mode={mode}", "--trainer.max_steps=8"]
        cli("fit", tiny_model, file, tmp_path / mode, *options)
    online, precomputed = columns(tmp_path / "online"), columns(tmp_path / "precomputed")
    assert online.keys() == precomputed.keys()
    for name, values in online.items():
        # float32: the pass runs examples in other groups, so sums differ in their last bits, and steps carry that on.
        assert precomputed[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert abs(online["train/kl"][-1]) > 1e-2  # otherwise there would be nothing to compare
    before = shards(file)
    options = ["--model.objective=KTO", "--model.objective.loss=apo_zero_unpaired", "--trainer.max_steps=1"]
    cli("fit", tiny_model, file, tmp_path / "apo", "--model.reference.mode=precomputed", *options)
    assert len(shards(file) - before) == 2


@pytest.mark.slow
def test_adapters_share_the_scores_of_the_model_without_them(
    tiny_model: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_model, data_file)
    sizes = count_batches(monkeypatch)
    fit(tiny_model, data_file, lora=LoRA(r=2))
    assert sizes == []


@pytest.mark.slow
def test_no_second_model_is_in_memory(tiny_model: Path, data_file: Path) -> None:
    def models() -> int:
        gc.collect()
        return sum(type(thing) is Policy for thing in gc.get_objects())

    for mode, expected in (("online", 2), ("precomputed", 1)):
        before = models()
        module = fit(tiny_model, data_file, ReferenceSettings(mode))
        assert models() - before == expected
        del module


def test_the_pass_does_not_depend_on_the_default_device_and_draws_no_random_number(
    tiny_model: Path, data_file: Path
) -> None:
    """Lightning creates models with the accelerator as the default device."""

    class Elsewhere(AlignmentModule):
        def _set_up_reference(self, initial: Policy | None) -> None:
            state = torch.get_rng_state()
            with torch.device("meta"):
                super()._set_up_reference(initial)
            assert torch.equal(torch.get_rng_state(), state)

    module = Elsewhere(str(tiny_model), DPO(), Consistency(mlc=MLC(weight=0.0)), PRECOMPUTED)
    trainer_of().fit(module, data_of(tiny_model, data_file))
    assert tables(module)["train"].logps.isfinite().all()


# ---- the cache ----------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing(tiny_model: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(tiny_model, data_file)
    sizes = count_batches(monkeypatch)
    second = fit(tiny_model, data_file, data={"batch_size": 1}, trainer={"max_steps": 1})
    assert sizes == []
    for split, scores in tables(first).items():
        assert torch.equal(tables(second)[split].logps, scores.logps)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"trainer": {"precision": "bf16-mixed"}}, "precision 32-true there, bf16-mixed here"),
        ({"attn_implementation": "eager"}, "attention sdpa there, eager here"),
        ({"data": {"max_response_length": 9}}, None),  # other data, so there is nothing to compare with
    ],
)
def test_what_the_scores_depend_on_is_computed_anew(
    tiny_model: Path,
    data_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    named: str | None,
) -> None:
    fit(tiny_model, data_file)
    sizes = count_batches(monkeypatch)
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addHandler(caplog.handler)
    try:
        fit(tiny_model, data_file, **change)
    finally:
        rank_zero.removeHandler(caplog.handler)
    assert sum(sizes) == 13
    if named is None:
        assert "cannot be used" not in caplog.text
    else:
        assert named in caplog.text


def test_scores_of_other_weights_are_not_taken(
    tiny_model: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number in the model changes, and the name of its folder does not."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = fit(model, data_file)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    sizes = count_batches(monkeypatch)
    after = fit(model, data_file)
    assert sum(sizes) == 13
    assert not torch.equal(tables(after)["train"].logps, tables(before)["train"].logps)


def test_a_tampered_manifest_is_told_and_its_scores_computed_again(
    tiny_model: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tiny_model, data_file)
    for manifest in (data_file.parent / "cache" / "reference").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        content["parts"]["precision"] = "64-true"
        manifest.write_text(json.dumps(content))
    sizes = count_batches(monkeypatch)
    fit(tiny_model, data_file)
    assert sum(sizes) == 13
    assert "precision 64-true there, 32-true here" in caplog.text


def test_an_interrupted_pass_goes_on_where_it_ended(
    tiny_model: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SCORING_EXAMPLES", 2)  # 9 training rows: batches of 2, 2, 2, 2, 1
    whole = tables(fit(tiny_model, data_file))
    shutil.rmtree(data_file.parent / "cache" / "reference")
    with monkeypatch.context() as patch:
        sizes = count_batches(patch, fail_after=3)
        with pytest.raises(OSError, match="the disk is gone"):
            fit(tiny_model, data_file)
        assert sizes == [2, 2, 2]
    sizes = count_batches(monkeypatch)
    again = tables(fit(tiny_model, data_file))
    assert sizes == [2, 1, 2, 2]  # the other training rows, and the validation rows
    for split, scores in whole.items():
        # Bitwise: the batches do not depend on where a pass was interrupted.
        assert torch.equal(again[split].logps, scores.logps)


KILLED = """
import os, signal, sys
from lightning_mlc.data import scoring
from lightning_mlc.reference import precomputed
from lightning_mlc.commands.training import run

scoring.SCORING_EXAMPLES, precomputed.SECONDS_PER_SHARD = 2, 0.0
run_batch, batches = precomputed.run_batch, []

def killing(*arguments):
    batches.append(1)
    if len(batches) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_batch(*arguments)

precomputed.run_batch = killing
run(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_pass_loses_no_more_than_the_last_shard(
    tiny_model: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "out": tmp_path / "out",
        "model.name_or_path": tiny_model,
        "model.consistency.mlc.weight": 0,
        "model.reference.mode": "precomputed",
        "data.train_path": data_file,
        "data.val_share": 0.3,
        "data.cache_dir": data_file.parent / "cache",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 1,
        "trainer.enable_progress_bar": "false",
    }
    arguments = ["fit", *(f"--{name}={value}" for name, value in options.items())]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=900, env=dict(os.environ)
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(shards(data_file)) == 3
    half = next((data_file.parent / "cache" / "reference").rglob("*.safetensors"))
    (half.parent / f".{half.name}.1-0.unfinished").write_bytes(
        half.read_bytes()[:50]
    )  # what a kill while writing leaves
    monkeypatch.setattr(scoring, "SCORING_EXAMPLES", 2)
    sizes = count_batches(monkeypatch)
    again = tables(run(arguments).model)  # the same command: nothing that was written prevents it
    assert sizes == [2, 1, 2, 2]
    shutil.rmtree(data_file.parent / "cache" / "reference")
    for split, scores in tables(run([*arguments, f"--out={tmp_path / 'other'}"]).model).items():
        assert torch.equal(again[split].logps, scores.logps)


def test_log_probabilities_that_are_not_finite_are_refused_and_not_kept(data_file: Path, tmp_path: Path) -> None:
    """One token of the data has NaN states. The trial of a newly loaded model does not use it."""
    model = save_model(tmp_path / "model", tie_word_embeddings=False)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][byte_tokenizer().convert_tokens_to_ids("n")] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.reference: .* not finite \(batch of r\d+, "):
        fit(model, data_file)
    assert not shards(data_file)


def test_progress_is_shown_where_the_trainer_shows_it(
    tiny_model: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_model, data_file)
    assert "reference" not in capsys.readouterr().err
    shutil.rmtree(data_file.parent / "cache" / "reference")
    fit(tiny_model, data_file, trainer={"enable_progress_bar": True, "callbacks": [RichProgressBar()]})
    shown = capsys.readouterr().err
    assert "reference scores, training data: " in shown
    assert "reference scores, validation data: " in shown


# ---- runs that go on, and runs that only measure -------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_finds_the_scores_of_the_initial_model_or_makes_them_again(
    tiny_model: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = "--model.reference.mode=precomputed"
    cli("fit", tiny_model, data_file, tmp_path / "whole", mode, "--trainer.max_steps=6")
    written = shards(data_file)
    shutil.rmtree(data_file.parent / "cache" / "reference")
    cli("fit", tiny_model, data_file, tmp_path / "parts", mode, "--trainer.max_steps=3")
    assert shards(data_file) == written
    found = count_batches(monkeypatch)
    cli("validate", tiny_model, data_file, tmp_path / "parts", mode, "--ckpt_path=last")
    cli("fit", tiny_model, data_file, tmp_path / "parts", mode, "--trainer.max_steps=4", "--ckpt_path=last")
    assert found == []
    shutil.rmtree(data_file.parent / "cache" / "reference")
    cli("fit", tiny_model, data_file, tmp_path / "parts", mode, "--trainer.max_steps=6", "--ckpt_path=last")
    # The names are hashes of the contents: these are the initial model's scores, bitwise.
    assert shards(data_file) == written
    after = [json.loads((tmp_path / out / "report" / "summary.json").read_text()) for out in ("whole", "parts")]
    assert after[1]["after"] == after[0]["after"]
    shutil.rmtree(data_file.parent / "cache" / "reference")
    measured = cli("validate", tiny_model, data_file, tmp_path / "parts", mode, "--ckpt_path=last")
    assert measured.model.validation_results == after[0]["after"]


def test_measuring_a_model_that_was_just_trained(tiny_model: Path, data_file: Path) -> None:
    """In one process, where the initial model no longer exists by then."""
    results = []
    for mode in ("online", "precomputed"):
        module = fit(tiny_model, data_file, ReferenceSettings(mode), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        data = data_of(tiny_model, data_file, test_path=str(data_file))
        trainer_of().test(module, data, verbose=False)
        results.append(module.validation_results)
    assert results[0].keys() == results[1].keys()
    assert abs(results[0]["test/rewards/margins/mean"]) > 1e-3
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-5)


def test_predicting_needs_no_scores(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    more = ["--model.reference.mode=precomputed", "--model.max_new_tokens=2"]
    cli("predict", tiny_model, data_file, tmp_path / "out", *more)
    assert (tmp_path / "out" / "predictions.jsonl").exists()
    assert not (data_file.parent / "cache" / "reference").exists()


def test_online_scores_of_evaluation_are_computed_once(tiny_model: Path, data_file: Path) -> None:
    scored: list[int] = []

    class Counting(OnlineReference):
        def score(self, batch: Any, *more: Any) -> Any:
            scored.append(len(batch))
            return super().score(batch, *more)

    module = AlignmentModule(str(tiny_model), DPO(), Consistency(mlc=MLC(weight=0.0)))
    data = data_of(tiny_model, data_file)
    trainer_of().validate(module, data, verbose=False)
    first = dict(module.validation_results)
    assert module.policy is not None
    module._reference = Counting(module.policy)
    for _ in range(2):
        trainer_of().validate(module, data, verbose=False)
        assert module.validation_results == first
    assert scored == [2, 2]


def test_a_folder_of_another_model_shape_never_fits(tmp_path: Path, tiny_model: Path, data_file: Path) -> None:
    fit(tiny_model, data_file)
    other = save_model(tmp_path / "other", num_hidden_layers=2)
    fit(other, data_file)
    folders = list((data_file.parent / "cache" / "reference").iterdir())
    assert len(folders) == 4  # training and validation rows of two models
