"""``model.consistency.layer: auto`` chooses a layer once; from then on the run is that with the number of the layer."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, metrics_rows, save_model, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mlc.checkpoints.finding import checkpoint_files
from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.cli import main
from lightning_mlc.commands.training import run
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.training.layer_choice import PROMPTS, prompts_to_measure

AUTO = "--model.consistency.layer=auto"
LETTERS, DIGITS = "abcdefgh", "12345678"
DIGIT_DIMENSIONS, LETTER_DIMENSIONS = 0, 8
"""Where the embeddings of eight digits, and of eight letters, begin. No other token has anything there."""


def layered_model(folder: Path) -> Path:
    """Save a model whose first and third layers collect the digits of a text, and whose second collects its letters.

    All tokens attend equally to all before them. The second layer adds ten times as much as the first, the third a
    hundred times as much, so what a layer collects is most of its output.
    """
    save_model(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "embed" not in name:
                parameter.zero_()
        embeddings = model.get_input_embeddings().weight
        embeddings[:, :16] = 0
        for start, characters in ((DIGIT_DIMENSIONS, DIGITS), (LETTER_DIMENSIONS, LETTERS)):
            for place, character in enumerate(characters):
                embeddings[tokenizer.convert_tokens_to_ids(character), start + place] = 1
        for layer, start, factor in zip(
            model.model.layers, (DIGIT_DIMENSIONS, LETTER_DIMENSIONS, DIGIT_DIMENSIONS), (1, 10, 100), strict=True
        ):
            for place in range(8):  # values of the first head, and their place in its output
                layer.self_attn.v_proj.weight[place, start + place] = 1
                layer.self_attn.o_proj.weight[start + place, place] = factor
                # A little of what other tokens have, so that no layer is the identity for a text without both.
                layer.self_attn.v_proj.weight[8 + place, 16 + place] = 1
                layer.self_attn.o_proj.weight[16 + place, 16 + place] = 0.1
    model.save_pretrained(folder)
    return folder


def crossed_rows(by_letter: bool) -> list[dict[str, Any]]:
    """Eight prompts in three languages, whose texts are a letter and a digit: one says the prompt, one the language."""
    rows = example_rows(8)
    for number, row in enumerate(rows):
        letters, digits = ([LETTERS[number]] * 3, DIGITS[:3]) if by_letter else (LETTERS[:3], [DIGITS[number]] * 3)
        row["prompt"] = {
            language: letter + digit
            for language, letter, digit in zip(("en", "sw", "zh"), letters, digits, strict=True)
        }
    return rows


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model whose layer 2 is best for the first data file, and another for the second."""
    folder = tmp_path_factory.mktemp("layered")
    data = [write_jsonl(folder / f"{by}.jsonl", crossed_rows(by == "letter")) for by in ("letter", "digit")]
    return layered_model(folder / "model"), data[0], data[1]


def arguments(command: str, model: Path, data: Path, out: Path, *more: str, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": model,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-3,
        "data.train_path": data,
        "data.val_share": 0.25,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 3,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        **changes,
    }
    return [command, *(f"--{name}={value}" for name, value in options.items()), *more]


def provenance(out: Path) -> Provenance:
    return Provenance.read(read_checkpoint(checkpoint_files(out)[-1]))


def layers_in(out: Path) -> tuple[Any, Any]:
    """The layers that the newest checkpoint has: of its extractor, and of its recipe."""
    found = provenance(out)
    assert found.representation is not None
    assert found.recipe is not None
    return found.representation["layer"], found.recipe["consistency"]["layer"]


@pytest.fixture(scope="module")
def chosen(layered: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that chose its layer."""
    out = tmp_path_factory.mktemp("chosen") / "out"
    run(arguments("fit", *layered[:2], out, AUTO))
    return out


def test_a_run_that_chose_a_layer_is_the_run_with_its_number(
    layered: tuple[Path, Path, Path], chosen: Path, tmp_path: Path
) -> None:
    run(arguments("fit", *layered[:2], tmp_path / "given", "--model.consistency.layer=2"))
    assert layers_in(chosen) == layers_in(tmp_path / "given") == (2, 2)
    assert metrics_rows(chosen) == metrics_rows(tmp_path / "given")
    states = [read_checkpoint(checkpoint_files(out)[-1])["state_dict"] for out in (chosen, tmp_path / "given")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    # Another layer would not have done the same.
    run(arguments("fit", *layered[:2], tmp_path / "last", "--model.consistency.layer=-1"))
    assert metrics_rows(chosen) != metrics_rows(tmp_path / "last")


@pytest.mark.parametrize(
    "more",
    [
        ["--model.gradient_checkpointing=true"],
        ["--model.lora.r=2", "--model.gradient_checkpointing=true", "--model.packing=false"],
    ],
    ids=["checkpointing", "lora"],
)
def test_other_ways_to_train_choose_the_same_layer(
    layered: tuple[Path, Path, Path], tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cli = run(arguments("fit", *layered[:2], tmp_path / "out", AUTO, *more, **{"trainer.max_steps": 1}))
    assert layers_in(tmp_path / "out") == (2, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("layer:")]
    assert len(said) == 1
    assert said[0].startswith("layer: 2 of 3 (silhouette by prompt 0.")
    assert said[0].endswith("on 6 training prompts in 3 languages)")
    policy = cli.model.policy
    assert policy is not None
    assert all(module.training for module in policy.modules())


def test_a_resumed_run_keeps_the_layer_though_the_data_has_changed(
    layered: tuple[Path, Path, Path], chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, other = layered
    # With the other data, a new run takes another layer.
    run(arguments("fit", model, other, tmp_path / "new", AUTO, **{"trainer.max_steps": 1}))
    assert layers_in(tmp_path / "new")[0] in (1, 3)
    # Stopped at the end of an epoch, where other rows are allowed.
    run(arguments("fit", model, data, tmp_path / "out", AUTO, **{"trainer.max_steps": 6}))
    capsys.readouterr()
    run(arguments("fit", model, other, tmp_path / "out", AUTO, "--ckpt_path=last", **{"trainer.max_steps": 8}))
    assert "layer: 2 of 3 (the checkpoint's)" in capsys.readouterr().err.splitlines()
    assert layers_in(tmp_path / "out") == (2, 2)


def test_what_comes_after_the_run_has_the_layer(
    layered: tuple[Path, Path, Path], chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, _ = layered
    checkpoint = checkpoint_files(chosen)[-1]
    cli = run(arguments("validate", model, data, chosen, AUTO, "--ckpt_path=last"))
    summary = json.loads((chosen / "report/summary.json").read_text())
    assert cli.model.validation_results == summary["after"]
    assert main(["export", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'model'}"]) == 0
    assert json.loads((tmp_path / "model/lightning_mlc.json").read_text())["representation"]["layer"] == 2
    assert "layer 2," in (tmp_path / "model/README.md").read_text()
    models = [f"base={model}", f"new={checkpoint}"]
    options = ["--judges=refusal", "--max_new_tokens=2", "--bootstrap=100", "--device=cpu", "--dtype=float32"]
    assert main(["evaluate", "--models", *models, "--prompts", str(data), *options, f"--out={tmp_path / 'eval'}"]) == 0
    results = json.loads((tmp_path / "eval/results.json").read_text())["representations"]
    assert results["new"]["extracted"]["layer"] == 2
    assert results["base"]["silhouettes"]["layer"] == 2
    assert len(results["base"]["silhouettes"]["by_prompt"]) == 4
    assert "2 of 3" in (tmp_path / "eval/report.md").read_text()


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(args) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_choose_a_layer_is_refused(
    layered: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, _ = layered
    out, off = tmp_path / "out", "--model.consistency.mlc.weight=0"
    one = write_jsonl(tmp_path / "one.jsonl", [row | {"prompt": {"en": "a1", "sw": "a2"}} for row in example_rows(4)])
    none = "no term that is on compares hidden states"
    assert none in refused(arguments("fit", model, data, out, AUTO, off), capsys)
    assert none in refused(arguments("fit", model, data, out, AUTO, off, "--model.consistency.mpo.weight=1"), capsys)
    assert "which fit chooses; give the number" in refused(arguments("validate", model, data, out, AUTO), capsys)
    assert "silhouettes need two prompts or more" in refused(
        arguments("fit", model, one, out, AUTO, **{"data.val_share": 0}), capsys
    )
    assert "model.consistency.layer" in refused(
        arguments("fit", model, data, out, "--model.consistency.layer=middle"), capsys
    )
    assert [path.name for path in out.rglob("*")] == []  # so that the next attempt can have the same folder


def test_a_checkpoint_of_a_deeper_model_is_refused(
    layered: tuple[Path, Path, Path], chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save_model(tmp_path / "small", num_hidden_layers=1)
    more = f"--ckpt_path={checkpoint_files(chosen)[-1]}"
    assert "the checkpoint was trained on layer 2, which this model of 1 layers does not have" in refused(
        arguments("fit", small, layered[1], tmp_path / "out", AUTO, more), capsys
    )


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("strategy", ["--trainer.strategy=ddp", "--config=strategy/fsdp2"], ids=["ddp", "fsdp2"])
def test_all_processes_have_the_layer_of_the_first(
    strategy: str, layered: tuple[Path, Path, Path], chosen: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = arguments("fit", *layered[:2], out, AUTO, strategy, **{"trainer.devices": 2})
    command = [sys.executable, "-m", "lightning_mlc", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("layer: 2 of 3 (silhouette by prompt") == 1
    assert layers_in(out) == (2, 2)
    # A process with another layer would change the means over both.
    command = [
        argument.replace(str(out), str(tmp_path / "given")).replace("layer=auto", "layer=2") for argument in command
    ]
    assert subprocess.run(command, capture_output=True, timeout=900).returncode == 0
    assert metrics_rows(out) == metrics_rows(tmp_path / "given")


def test_an_estimate_takes_the_last_layer_and_says_so(
    layered: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for layer in ("auto", "-1"):
        args = arguments("estimate", *layered[:2], tmp_path / "out", f"--model.consistency.layer={layer}")
        assert main(args) == 0
        tables.append(capsys.readouterr().out.splitlines())
    said = [line for line in tables[0] if line.startswith("layer:")]
    assert said == ["layer: fit chooses it (auto); the estimate takes the last one, which needs the most memory"]
    assert [line for line in tables[0] if line not in said] == tables[1]


def data_of(path: Path, model: Path) -> MultilingualData:
    data = MultilingualData(str(path), name_or_path=str(model), val_share=0.0)
    data.prepare_data()
    data.setup("fit")
    return data


def test_prompts_are_different_and_from_all_of_the_data(tiny_model: Path, tmp_path: Path) -> None:
    rows = example_rows(3 * PROMPTS)
    for row in rows[1::3]:
        row["prompt"] = {"en": row["prompt"]["en"]}  # in one language
    data = data_of(write_jsonl(tmp_path / "many.jsonl", rows), tiny_model)
    found = [int(example["id"][1:]) for example in prompts_to_measure(data)]
    assert len(found) == PROMPTS
    assert (found[0], found[-1]) == (0, 3 * PROMPTS - 1)
    assert max(b - a for a, b in pairwise(found)) <= 5
    assert not [number for number in found if number % 3 == 1]

    repeated = [row | {"id": f"r{i}", "prompt": rows[3 * (i // 2)]["prompt"]} for i, row in enumerate(rows[:6])]
    data = data_of(write_jsonl(tmp_path / "repeated.jsonl", repeated), tiny_model)
    assert [example["id"] for example in prompts_to_measure(data)] == ["r0", "r2", "r4"]
