"""``~`` means a user's folder in every path option, and two runs never write to one folder."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from conftest import example_rows, metrics_rows, write_jsonl

from benchmarks import scaling, train_step
from benchmarks.study import __main__ as study
from lightning_mlc import cli
from lightning_mlc.commands.evaluate import parse
from lightning_mlc.commands.training import make_cli
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.files.paths import expand_all, expanded, user_path
from lightning_mlc.training.run_folder import CONFIG, take


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, and a working directory where a folder called ``~`` would show."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_what_is_expanded(home: Path) -> None:
    assert expanded("~/a/~", "out") == f"{home}/a/~"
    assert expanded("~", "out") == str(home)
    for text in ("a/~/b", "hf://a/b?split=~", "~notes.jsonl", "", "./~/a"):
        assert expanded(text, "out") == text
    with pytest.raises(UserError, match=r"^out: there is no user nobody-here; write \./~nobody-here for a folder of"):
        expanded("~nobody-here/a", "out")
    options = argparse.Namespace(out="~/a", parts=[{"path": "~/b"}, "~/c", 3], other=None)
    expand_all(options)
    assert vars(options) == {"out": f"{home}/a", "parts": [{"path": f"{home}/b"}, f"{home}/c", 3], "other": None}
    with pytest.raises(UserError, match=r"^parts\[0\]\.path: there is no user"):
        expand_all({"parts": [{"path": "~nobody-here/b"}]})


def test_fit_export_and_predict_in_the_home_folder(
    home: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "model").symlink_to(tiny_model)
    write_jsonl(home / "pairs.jsonl", example_rows(6))
    options = [
        "--data.train_path=~/pairs.jsonl",
        "--data.cache_dir=~/cache",
        "--model.name_or_path=~/model",
        "--out=~/run",
        "--trainer.max_steps=1",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.init_args.save_dir=~/logs",
    ]
    assert cli.main(["fit", *options]) == 0
    kept = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(["fit", *options]) == 2
    assert f"error: out: {home}/run exists and is not an empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()} == kept
    assert cli.main(["validate", *options, "--ckpt_path=~/run/checkpoints/last.ckpt"]) == 0
    assert cli.main(["export", "--ckpt_path=~/run", "--out=~/exported"]) == 0
    assert (home / "exported" / "model.safetensors").is_file()
    assert sorted(path.name for path in home.iterdir()) == ["cache", "exported", "logs", "model", "pairs.jsonl", "run"]
    assert list(Path.cwd().iterdir()) == []


def test_the_cache_of_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mlc.data.datamodule import MultilingualData

    monkeypatch.setenv("LIGHTNING_MLC_CACHE", "~/kept")  # no shell expands a file of variables
    assert MultilingualData().cache_dir == home / "kept"


def test_evaluate(home: Path) -> None:
    (home / "a.yaml").write_text("ordinary: ['~/o.csv']\nmodels: [x]\n")
    options = ["--models", "before=~/m", "~/n", "--prompts", "~/p.csv", "--judges", "refusal", "llm=~/j"]
    settings = parse(["--config=~/a.yaml", *options, "--out=~/out", "--openings=~/o"])
    assert settings.models == [f"before={home}/m", f"{home}/n"]
    assert settings.judges == ["refusal", f"llm={home}/j"]
    assert (settings.prompts, settings.ordinary) == ([f"{home}/p.csv"], [f"{home}/o.csv"])
    assert (settings.out, settings.openings) == (f"{home}/out", f"{home}/o")


def test_benchmarks(home: Path) -> None:
    assert user_path("~/x") == home / "x"
    assert train_step.parse(["--out", "~/x"]).out == home / "x"
    options = study.parse(
        ["--config", "~/g.yaml", "--out", "~/x", "--model", "~/m", "--page", "~/p", "--report", "~/r"]
    )
    assert [str(options.config), str(options.out), options.model] == [f"{home}/{name}" for name in ("g.yaml", "x", "m")]
    assert [options.page, options.report] == [home / "p", home / "r"]
    with pytest.raises(SystemExit):
        scaling.main(["--out", "~nobody-here/x"])


@pytest.mark.parametrize("key", ["data.languages", "data.languages+"])
def test_norwegian_without_quotes(key: str, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("data:\n  languages: [en, no]\n")
    args = ["fit", f"--config={config}"] if key == "data.languages" else ["fit", "--data.languages", "[en, no]"]
    with pytest.raises(
        UserError, match=r"^data\.languages: must be text, got False; YAML reads no or off as a truth value"
    ):
        make_cli(args)


# ---- one run in one folder ------------------------------------------------------------------------------------------


def test_one_of_many_takes_a_new_folder(tmp_path: Path) -> None:
    taken, refused = [], []
    start = threading.Barrier(16)

    def run() -> None:
        start.wait()
        try:
            taken.append(take(tmp_path / "runs" / "new", is_new=True))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert set(refused) == {f"out: another run has begun in {tmp_path}/runs/new; give another --out"}
    os.close(taken[0])


def hold(folder: Path, ready: Connection) -> None:
    take(folder, is_new=True)
    ready.send("taken")
    time.sleep(600)


def test_a_folder_is_free_once_its_run_has_ended_however_it_did(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ours.recv() == "taken"
    with pytest.raises(UserError, match=r"^out: another run is writing to .*; wait until it ends, or give another"):
        take(tmp_path, is_new=False, wait=0)
    process.kill()
    process.join()
    os.close(take(tmp_path, is_new=False, wait=0))
    with pytest.raises(UserError, match=r"^out: another run has begun in"):
        take(tmp_path, is_new=True)


@pytest.mark.parametrize("more", [[], ["--ckpt_path=auto"], ["--ckpt_path=last"]])
def test_a_second_run_damages_nothing(
    tmp_path: Path,
    tiny_model: Path,
    pairs_file: Path,
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It starts before the first run has written anything (or while that is resumed), so only the lock can reveal
    it."""
    out = tmp_path / "run"
    options = [
        f"--data.train_path={pairs_file}",
        f"--model.name_or_path={tiny_model}",
        f"--out={out}",
        "--trainer.max_steps=1",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    monkeypatch.setattr("lightning_mlc.training.run_folder.WAIT", 0.0)
    if more == ["--ckpt_path=last"]:
        assert cli.main(["fit", *options]) == 0
    from lightning_mlc.data.datamodule import MultilingualData

    prepare, kept, locks = MultilingualData.prepare_data, {}, []

    def first_run_begins(data: MultilingualData) -> None:
        prepare(data)
        locks.append(take(out, is_new=more != ["--ckpt_path=last"]))
        if not (out / "metrics.csv").exists():
            (out / CONFIG).write_text("the first run's")
            (out / "metrics.csv").write_text("step,loss\n0,1.5\n7,1.25\n")
        kept.update({path: path.read_bytes() for path in out.rglob("*") if path.is_file()})

    monkeypatch.setattr(MultilingualData, "prepare_data", first_run_begins)
    capsys.readouterr()
    assert cli.main(["fit", *options, *more, "--trainer.max_steps=2"]) == 2
    told = "is writing to" if more else "has begun in"
    assert f"error: out: another run {told} {out}; " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    os.close(locks[0])  # the first run has ended; if it was new, before its first checkpoint
    monkeypatch.setattr(MultilingualData, "prepare_data", prepare)
    assert cli.main(["fit", *options, *more, "--trainer.max_steps=2"]) == (0 if more else 2)
    if more:
        steps = [row["step"] for row in metrics_rows(out) if row["train/loss"]]
        assert steps == ["0", "1"]


def test_the_identity_of_a_model_whose_file_name_would_be_a_pattern(tmp_path: Path) -> None:
    found = []
    for content in (b"a", b"b"):
        (tmp_path / "m[1].gguf").write_bytes(content)
        found.append(System("m", str(tmp_path / "m[1].gguf")).identity["files"])
    assert found[0] != found[1]
