"""``lightning-mlc evaluate`` from start to end: its files, its messages, and recovery after failures."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import example_rows, save_model, write_jsonl

sys.path.insert(0, str(Path(__file__).parent))
from fake_endpoint import Answer, completion, failure, serve

from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.checkpoints.restore import restore
from lightning_mlc.cli import main
from lightning_mlc.commands.evaluate import FORMS, parse
from lightning_mlc.commands.training import run
from lightning_mlc.consistency import Consistency
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.evaluation.judges.roster import make_judges
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.evaluation.systems import resolved
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.sources import ModelSource

QUICK = ["--max_new_tokens=6", "--bootstrap=100", "--device=cpu", "--representation_prompts=0"]
STATES = "--representation_prompts=4"


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "k")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "one", initializer_range=0.5)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "two", "qwen2", initializer_range=0.5)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = example_rows(5)
    rows[3]["prompt"]["sw"] = None
    rows[4]["kind"] = "ordinary"
    return write_jsonl(tmp_path / "asked.jsonl", rows)


def records(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines if line]
    return {(record["set"], record["id"], record["language"]): record for record in found}


def figure(results: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    found = [one for one in results["figures"] if all(one.get(key) == value for key, value in wanted.items())]
    assert len(found) == 1, wanted
    chosen: dict[str, Any] = found[0]
    return chosen


def test_a_system_is_resolved_once(model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt is tokenised once for lengths, responses, likelihoods and states; the engine is chosen once."""
    tokenised: list[str] = []
    engines: list[str] = []
    prompt, engine_of = ChatTokenizer.prompt, resolved.engine_of

    def noted(chat: ChatTokenizer, messages: Any, where: str, header: bool = True) -> Any:
        tokenised.append(json.dumps(messages))
        return prompt(chat, messages, where, header)

    def counted(system: System, engine: Any) -> Any:
        engines.append(system.label)
        return engine_of(system, engine)

    monkeypatch.setattr(ChatTokenizer, "prompt", noted)
    monkeypatch.setattr(resolved, "engine_of", counted)
    args = [f"--models=m={model}", f"--prompts={prompts}", "--judges=refusal,margin", f"--out={tmp_path / 'out'}"]
    assert main(["evaluate", *args, *QUICK, STATES]) == 0
    assert len(tokenised) == len(set(tokenised)) > 0
    assert engines == ["m"]


def test_two_models_from_prompts_to_report(
    model: Path, other: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["evaluate", "--models", f"base={model}", f"new={other}", "--prompts", str(prompts)]
    args += ["--judges", "refusal", "margin", "--seen", "en,zh", "--reference=base", f"--out={out}", *QUICK, STATES]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert f"wrote\n  {out}/report.html" in said

    responses = records(out / "base" / "responses.jsonl")
    assert len(responses) == 5 * 3 - 1
    assert {len(record["response"]) for record in responses.values()} <= set(range(7))
    assert responses.keys() == records(out / "new" / "verdicts-refusal.jsonl").keys()

    results = json.loads((out / "results.json").read_text(), parse_constant=lambda _: pytest.fail("not JSON"))
    assert [one["name"] for one in results["models"]] == ["base", "new"]
    assert results["sets"][0]["languages"] == {"en": 4, "sw": 3, "zh": 4}
    assert results["sets"][1]["kind"] == "ordinary"
    safe = {"set": "asked", "judge": "refusal", "measure": "safe", "baseline": None}
    counts = {scope: figure(results, model="new", scope=scope, **safe)["count"] for scope in ("sw", "seen", "unseen")}
    assert counts == {"sw": 3, "seen": 8, "unseen": 3}
    margins = [record["margin"] for key, record in records(out / "new" / "margins.jsonl").items() if key[2] == "sw"][:3]
    found = figure(results, model="new", set="asked", measure="refusal margin", scope="sw", baseline=None)
    assert found["value"] == pytest.approx(sum(margins) / 3)
    base = figure(results, model="base", set="asked", measure="refusal margin", scope="mean", baseline=None)
    new = figure(results, model="new", set="asked", measure="refusal margin", scope="mean", baseline=None)
    difference = figure(results, model="new", set="asked", measure="refusal margin", scope="mean", baseline="base")
    assert difference["value"] == pytest.approx(new["value"] - base["value"])
    # The reference has no preference over itself; the other model has one.
    reward = {"set": "asked", "measure": "reward margin", "scope": "mean", "baseline": None}
    assert figure(results, model="base", **reward)["value"] == 0
    assert figure(results, model="new", **reward)["value"] != 0
    assert figure(results, model="base", **reward | {"measure": "reward accuracy"})["value"] == 0.5
    for measure in ("refused", "invalid"):
        assert figure(results, model="new", set="asked-ordinary", measure=measure, scope="mean", baseline=None)
    assert figure(results, model="new", set="asked", measure="pag", baseline="base")["count"] == 4
    apart = figure(results, model="new", set="asked", measure="told apart by margin", scope="en", baseline=None)
    assert (apart["value"], apart["kinds"]) == (None, [4, 1])
    assert results["judges"][0]["named"] == "refusal"
    states = results["representations"]["new"]
    assert len(states["raw"]["explained_variance"]) == 4
    assert states["centred"]["cosines"][3][0][0] == pytest.approx(1)

    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    for text in ("asked, judged by refusal", "asked-ordinary, judged by refusal", "refusal margin", "Hidden states"):
        assert text in html
        assert text in markdown
    pictures = [line.split("](")[1].rstrip(")") for line in markdown.splitlines() if line.startswith("![")]
    assert len(pictures) > 6
    assert all((out / picture).is_file() for picture in pictures)
    assert html.count("<img ") == len(pictures)
    # Only the journal of responses may have texts of prompts or responses.
    texts = ["that is not mine", "isiyo yangu", "我怎样"]
    texts += [record["response"] for record in responses.values() if len(record["response"]) > 3]
    for place in (said, html, markdown, (out / "results.json").read_text()):
        assert not [text for text in texts if text in place]


@pytest.mark.slow
def test_harmful_prompts_are_told_apart_from_ordinary_ones(
    model: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = example_rows(13)
    for row in rows[6:]:
        row["kind"] = "ordinary"
    rows[12]["prompt"]["sw"] = rows[0]["prompt"]["zh"] = None
    asked, out = write_jsonl(tmp_path / "asked.jsonl", rows), tmp_path / "out"
    args = ["evaluate", "--models", f"base={model}", f"new={other}", f"--prompts={asked}", "--judges=refusal,margin"]
    assert main([*args, f"--out={out}", *QUICK]) == 0
    results = json.loads((out / "results.json").read_text())
    apart = {"model": "new", "set": "asked", "judge": "margin", "measure": "told apart by margin"}
    found = figure(results, scope="sw", baseline=None, **apart)
    margins = records(out / "new" / "margins.jsonl")
    harmful, ordinary = (
        [record["margin"] for key, record in margins.items() if key[0] == name and key[2] == "sw"]
        for name in ("asked", "asked-ordinary")
    )
    assert found["kinds"] == [len(harmful), len(ordinary)] == [6, 6]
    assert found["value"] == pytest.approx(sum(h > o for h in harmful for o in ordinary) / 36)
    assert found["low"] <= found["value"] <= found["high"]
    few = figure(results, scope="zh", baseline=None, **apart)
    assert (few["value"], few["kinds"]) == (None, [5, 7])
    assert figure(results, scope="mean", baseline="base", **apart)["value"] is not None
    declines = apart | {"judge": "refusal", "measure": "told apart by declines"}
    assert figure(results, scope="mean", baseline=None, **declines)["kinds"] == [12, 13]
    said = capsys.readouterr().out
    for text in ((out / "report.html").read_text(), (out / "report.md").read_text(), said):
        assert "told apart" in text
        assert "too few (5 harmful, 7 ordinary)" in text


def test_texts_are_shown_to_those_who_ask_and_break_nothing(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt_en": "<script>alert('```')</script>"}, {"prompt_en": "b"}]
    asked, out = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out"
    args = ["evaluate", f"--models={model}", f"--prompts={asked}", f"--out={out}", *QUICK]
    assert main([*args, "--show_text"]) == 0
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&#39;```&#39;)&lt;/script&gt;" in html
    assert "````text\n<script>alert('```')</script>\n````" in markdown


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_gives_what_one_run_does(model: Path, tmp_path: Path) -> None:
    asked = write_jsonl(tmp_path / "p.jsonl", example_rows(24))
    args = [f"--models=m={model}", f"--prompts={asked}", "--judges=refusal,margin", "--batch_tokens=300", *QUICK]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["evaluate", *args, f"--out={whole}"]) == 0

    command = [sys.executable, "-m", "lightning_mlc", "evaluate", *args, f"--out={killed}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = killed / "m" / "responses.jsonl"
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    half = records(journal)
    assert 5 <= len(half) < 72, "it was to be killed in the middle"
    journal.write_bytes(journal.read_bytes() + b'{"set": "p", "id": "r9", "lang')  # as a kill may leave it
    assert main(["evaluate", *args, f"--out={killed}"]) == 0
    for name in ("responses", "verdicts-refusal", "margins", "pairs"):
        assert records(killed / "m" / f"{name}.jsonl") == records(whole / "m" / f"{name}.jsonl")
    assert (killed / "results.json").read_text() == (whole / "results.json").read_text()


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_a_changed_setting_is_refused(
    model: Path,
    other: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    args = [
        "evaluate",
        f"--models=m={model}",
        f"--prompts={prompts}",
        "--judges=refusal,margin",
        f"--out={out}",
        "--dtype=float32",
        *QUICK,
    ]
    assert main(args) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    from lightning_mlc.evaluation.systems.system import System

    monkeypatch.setattr(System, "load_model", lambda *_: pytest.fail("the model is loaded again"))
    less = ["--languages=en,sw", "--limit=2"]
    assert main([*args, *less]) == 0  # less of the same is already there
    assert main(args) == 0
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before
    capsys.readouterr()
    changed = example_rows(5)
    changed[0]["prompt"]["en"] = "Something else?"
    elsewhere = tmp_path / "new"
    elsewhere.mkdir()
    for more, message in (
        (["--max_new_tokens=7"], "max_new_tokens: 6 before, 7 now"),
        (["--dtype=bfloat16"], "dtype: float32 before, bfloat16 now"),
        ([f"--models=m={other}"], "model: "),
        ([f"--prompts={write_jsonl(elsewhere / 'asked.jsonl', changed)}"], "from another text"),
    ):
        assert main([*args, *more]) == 2
        assert message in capsys.readouterr().err


def test_endpoints_are_models_and_judges_and_what_fails_is_asked_next_time(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = {"mine": True}

    def behaviour(text: str, before: int) -> Answer:
        if "<<<ANSWER" in text:  # the judge
            if "bag 0" in text:
                return completion("I would rather not say.")
            return completion("Verdict: safe\nRefusal: yes" if "en)" in text else "Verdict: unsafe\nRefusal: no")
        if "bag 2" in text and limited["mine"]:
            return failure(429)
        if "bag 1" in text:
            return failure(400, code="content_filter")
        return completion("" if "bag 3" in text else "An answer.")

    out = tmp_path / "out"
    with serve(behaviour) as served:
        args = [
            "evaluate",
            "--models",
            f"far={served.url}#m",
            "--prompts",
            str(prompts),
            "--judges",
            f"llm={served.url}#j",
        ]
        args += [f"--out={out}", "--bootstrap=100", "--retries=0", "--concurrency=2"]
        assert main(args) == 2
        assert "3 of 14 requests got no answer (3 times status 429)" in capsys.readouterr().err
        assert len(records(out / "far" / "responses.jsonl")) == 11
        assert not (out / "results.json").exists()
        limited["mine"] = False
        asked = sum(served.asked.values())
        assert main(args) == 0
        again = [body["messages"][-1]["content"] for body in served.bodies[asked:]]
    assert sum("<<<ANSWER" not in text for text in again) == 3
    results = json.loads((out / "results.json").read_text())
    assert results["judges"][0]["named"] == f"llm={served.url}#j"
    (harmful,) = [one for one in results["coverage"] if one["set"] == "asked"]
    # Of 11 prompts: 3 in each language filtered (bag 1), 3 with nonsense from the judge (bag 0), 2 empty (bag 3), 3
    # judged.
    assert harmful == {
        "model": "far", "set": "asked", "judge": "llm", "prompts": 11, "no response": 3, "not ended": 0,
        "unreadable": 3, "safe": 1, "unsafe": 2, "invalid": 2,
    }  # fmt: skip
    safe = {"model": "far", "set": "asked", "measure": "safe"}
    assert figure(results, scope="en", **safe)["value"] == 0.5  # bag 2 is safe, bag 3 invalid
    assert figure(results, scope="sw", **safe) | {"low": 0, "high": 0} == {
        "model": "far", "set": "asked", "judge": "llm", "measure": "safe", "scope": "sw", "value": 0, "low": 0,
        "high": 0, "count": 1,
    }  # fmt: skip
    assert results["representations"] == {}


def test_sampled_answers_never_pass_for_greedy_ones(tmp_path: Path, model: Path) -> None:
    """For a model and a judge that refuse a temperature of 0: records, results and report say so."""

    def refuses(body: dict[str, Any]) -> Answer | None:
        sampled = body["model"] in ("m", "j") and "temperature" in body
        return failure(400, param="temperature", code="unsupported_value") if sampled else None

    def behaviour(text: str, before: int) -> Answer:
        return completion("Verdict: safe\nRefusal: no" if "ANSWER" in text else "An answer.")

    rows, out = write_jsonl(tmp_path / "asked.jsonl", example_rows(2)), tmp_path / "out"
    with serve(behaviour, refuses) as served:
        args = ["evaluate", "--models", f"far={served.url}#m", f"near={served.url}#older", f"here={model}"]
        args += [f"--prompts={rows}", f"--judges=refusal,llm={served.url}#j", f"--out={out}", *QUICK]
        assert main(args) == 0
    says = {
        name: {record.get("decoding") for record in records(out / name / "responses.jsonl").values()}
        for name in ("far", "near", "here")
    }
    assert says == {"far": {"default"}, "near": {None}, "here": {None}}
    for name in ("far", "near"):
        assert {record.get("decoding") for record in records(out / name / "verdicts-llm.jsonl").values()} == {"default"}
        assert json.loads((out / name / "responses.settings.json").read_text())["decoding"] != "greedy"
    results = json.loads((out / "results.json").read_text())
    assert {one["name"]: one["decoding"] for one in results["models"]} == {
        "far": "default", "near": "greedy", "here": "greedy"
    }  # fmt: skip
    assert {one["judge"]: one.get("decoding") for one in results["judges"]} == {"refusal": None, "llm": "default"}
    report = (out / "report.md").read_text()
    assert "The responses of `far` are sampled instead: the endpoint refuses a temperature of 0" in report
    assert "#j`. Its answers are sampled: " in report
    assert "`refusal`. Its answers" not in report


def test_one_text_in_two_languages_and_a_checkpoint_of_many_files_are_no_trouble(model: Path, tmp_path: Path) -> None:
    """Hidden states that do not differ have no centred variance, and the report says so."""
    rows = write_jsonl(tmp_path / "same.jsonl", [{"prompt": {"en": "bag", "sw": "bag"}}])
    out = tmp_path / "out"
    assert main(["evaluate", f"--models={model}", f"--prompts={rows}", f"--out={out}", *QUICK]) == 0
    assert "undefined" in (out / "report.md").read_text()
    folder = tmp_path / "fsdp.ckpt"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "part").write_text("1")
    prints = []
    for text in ("1", "2"):
        (folder / "inner" / "part").write_text(text)
        system = System("m", str(folder))
        vars(system)["provenance"] = None  # the contents of the files do not matter here
        prints.append(system.identity)
    assert prints[0] != prints[1]


def test_silence_is_no_answer_to_ordinary_prompts_and_is_shown(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": {"en": f"q{i}"}, "kind": "ordinary"} for i in range(3)])
    out = tmp_path / "out"
    with serve(lambda text, before: completion("")) as served:
        args = ["evaluate", f"--models=far={served.url}#m", f"--ordinary={rows}", f"--out={out}", *QUICK]
        assert main(args) == 0
    found = json.loads((out / "results.json").read_text())["figures"]
    shares = {(one["measure"], one["value"], one["count"]) for one in found if one["scope"] == "en"}
    assert shares == {("invalid", 1.0, 3), ("refused", 0.0, 3)}
    assert "Invalid responses, which neither refuse nor answer" in (out / "report.md").read_text()


def test_one_endpoint_that_fails_keeps_no_other_model_from_its_turn(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt that breaks the server each time is named, and all other work is done in the end."""

    def behaviour(text: str, before: int) -> Answer:
        return failure(500) if "bag 2" in text else completion("An answer.")

    out = tmp_path / "out"
    with serve(behaviour) as served:
        args = [
            "evaluate",
            "--models",
            f"far={served.url}#m",
            f"here={model}",
            "--prompts",
            str(prompts),
            f"--out={out}",
        ]
        assert main([*args, "--judges=refusal,margin", "--retries=0", *QUICK]) == 2
    said = capsys.readouterr().err
    assert "far: generate: " in said
    assert "3 of 14 requests got no answer (3 times status 500)" in said
    assert "(the first is 'r2' (en) of 'asked')" in said
    assert len(records(out / "far" / "verdicts-refusal.jsonl")) == 11
    for name in ("responses", "verdicts-refusal", "margins"):
        assert len(records(out / "here" / f"{name}.jsonl")) == 14


def test_a_guard_model_judges_here(model: Path, prompts: Path, tmp_path: Path) -> None:
    """A random model answers nonsense, which is counted."""
    out = tmp_path / "out"
    args = ["evaluate", f"--models=m={model}", f"--prompts={prompts}", f"--judges=qwen3guard={model}", f"--out={out}"]
    assert main([*args, *QUICK]) == 0
    verdicts = records(out / "m" / "verdicts-qwen3guard.jsonl")
    assert len(verdicts) == 14
    assert {verdict["label"] for verdict in verdicts.values()} <= {None, "invalid"}
    results = json.loads((out / "results.json").read_text())
    assert sum(one["unreadable"] for one in results["coverage"]) > 0
    assert "qwen3guard" in (out / "report.md").read_text()  # in the table of coverage


@pytest.mark.slow
def test_a_checkpoint_says_what_it_was_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", example_rows(8))
    run([
        "fit", "--config=quickstart", f"--model.name_or_path={tiny_model}", "--model.gguf_file=null",
        f"--data.train_path={data}", "--data.languages=[en,sw]", "--trainer.accelerator=cpu", "--trainer.max_steps=1",
        "--trainer.enable_progress_bar=false", f"--out={tmp_path / 'fit'}",
    ])  # fmt: skip
    path = tmp_path / "fit" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    own = Provenance.read(checkpoint)
    settings = Consistency(layer=2, extractor="frozen")
    languages = ("en", "sw")
    says = Provenance.of(ModelSource(**own.source), restore(checkpoint), None, languages, settings)
    checkpoint[Provenance.KEY] = says.as_dict()
    path.unlink()  # a link
    torch.save(checkpoint, path)
    folder, out = tmp_path / "fit" / "model", tmp_path / "out"
    assert main(["export", f"--ckpt_path={path}", f"--out={folder}"]) == 0
    args = ["evaluate", "--models", str(path), str(folder), f"--prompts={data}", "--judges=margin", f"--out={out}"]
    assert main([*args, *QUICK, STATES, "--dtype=bfloat16"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [(one["name"], one["seen"]) for one in results["models"]] == [
        ("fit-last", ["en", "sw"]),
        ("fit", ["en", "sw"]),
    ]
    # They are the same model.
    assert records(out / "fit-last" / "margins.jsonl") == records(out / "fit" / "margins.jsonl")
    scopes = {one["scope"] for one in results["figures"] if one["measure"] == "refusal margin"}
    assert {"seen", "unseen"} <= scopes
    assert results["representations"]["fit-last"]["extracted"]["layer"] == 2
    assert "extracted" not in results["representations"]["fit"]


def test_options_come_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"models": ["a", "b"], "prompts": ["sample"], "languages": ["en"], "limit": 3}))
    found = parse(["--config", str(path), "--languages", "en,sw", "ur", "--judges", "refusal,margin", "--limit", "5"])
    assert (found.models, found.languages, found.judges) == (["a", "b"], ["en", "sw", "ur"], ["refusal", "margin"])
    assert (found.prompts, found.limit) == (["sample"], 5)
    # The later of two values wins, even if it is the file's.
    assert parse(["--languages", "en,sw", "--limit", "5", f"--config={path}"]).languages == ["en"]
    assert parse(["--models", "a", "b", "--prompts=sample"]).models == ["a", "b"]
    assert parse(["--models=a", "--prompts=sample", "--seen=null"]).seen is None
    for given, shown in (([], False), (["--show_text"], True), (["--show_text", "false"], False)):
        assert parse(["--models=a", *given, "--prompts=sample"]).show_text is shown


def test_each_option_that_takes_a_list_is_in_the_table() -> None:
    kinds = typing.get_type_hints(EvaluationSettings)
    assert set(FORMS.lists) == {name for name, kind in kinds.items() if list[str] in (kind, *typing.get_args(kind))}
    assert set(FORMS.switches) == {name for name, kind in kinds.items() if kind is bool}


BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda model: [], "models: is not set"),
    (lambda model: ["--models", "--prompts=sample"], "argument --models: expected at least one argument"),
    (lambda model: [f"--models={model}"], "prompts: is not set"),
    (lambda model: [f"--models={model}", "--prompts=gone.jsonl"], "prompts: there is no file gone.jsonl"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--languages=en,tlh1"], "'tlh1' is not a language code"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--languages=fr"], "languages: no prompt is in 'fr'"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--seen=qqq1"], "seen: 'qqq1' is not a language code"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--judges=gpt"], "judges: there is no judge 'gpt'"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--judges=llm"], "judges: 'llm' needs a model"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--judges=refusal,refusal"], "a judge is named twice"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--judges=refusal=x"], "'refusal' takes no model"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--judges=llm=http://h/v1"], "http://HOST/v1#MODEL"),
    (lambda model: ["--models=http://h:port/v1#m", "--prompts=sample"], "models: write an endpoint as"),
    (lambda model: ["--models=http://[::1/v1#m", "--prompts=sample"], "models: write an endpoint as"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--judges=llm=http:///v1#m"], "judges: write an endpoint"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--judges=llm=/no/where"], "judges: there is no folder"),
    (lambda model: [f"--models={model}", "--prompts=sample", f"--out={model}/config.json"], "config.json is a file"),
    (lambda model: ["--models=http://h/v1", "--prompts=sample"], "models: write an endpoint as http://HOST/v1#MODEL"),
    (lambda model: ["--models=http://h/v1#m", "--prompts=sample", "--judges=margin"], "endpoints give no likelihoods"),
    (lambda model: ["--models", str(model), str(model), "--prompts=sample"], "models: two models are named 'one'"),
    (lambda model: ["--models=/no/where", "--prompts=sample"], "models: there is no folder /no/where"),
    (lambda model: ["--models=gone.ckpt", "--prompts=sample"], "models: there is no file gone.ckpt"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--reference=x"], "no local model is named 'x'"),
    (
        lambda model: ["--models", f"here={model}", "far=http://h/v1#m", "--prompts=sample", "--reference=far"],
        "is named 'far' (local models: here; endpoints give no likelihoods)",
    ),
    (
        lambda model: ["--models=https://one/v1#m", "--prompts=sample", "--judges=llm=https://two/v1#m"],
        "OPENAI_API_KEY: can be the key of only one host, but these need one: one, two",
    ),
    (lambda model: [f"--models={model}", "--prompts=sample", "--max_new_tokens=0"], "must be at least 1, got 0"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--engine=vllm"], "engine: vllm is not installed"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--device=abacus"], "device: cannot use abacus"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--openings=gone"], "openings: gone must be a JSON file"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--max_new_tokenz=3"], "did you mean --max_new_tokens?"),
    (lambda model: [f"--models={model}", "--prompts=sample", "--limit=x"], "limit"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD, ids=[message for _, message in BAD])
def test_a_wrong_call_gets_one_line_and_leaves_nothing(
    args: Callable[[Path], list[str]],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *args(model)]) == 2
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if line.startswith("error: ")] == said.err.splitlines()[-1:]
    assert message in said.err
    assert said.out == ""
    assert not any(tmp_path.iterdir())


def test_a_model_without_chat_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "bare", template=None)
    assert main(["evaluate", f"--models={folder}", "--prompts=sample", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "models: the tokenizer of" in error
    assert "has no chat template" in error
    assert (
        "or give one (`plain` or a Jinja file) as --model.chat_template of fit or --chat_template of evaluate" in error
    )


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["evaluate", "--models=base=tinny", "--prompts=sample", f"--out={tmp_path / 'out'}"]
    assert main(args) == 2
    assert "there is no folder tinny here, so it was taken for a hub id; check its spelling" in capsys.readouterr().err


def test_verdicts_know_how_they_were_made(model: Path) -> None:
    """The same judge in another precision, or with another request, is another judge."""
    settings = EvaluationSettings(models=["x"], prompts=["sample"], judges=[f"qwen3guard={model}"], device="cpu")
    (first,), (second,) = (
        make_judges(dataclasses.replace(settings, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )  # fmt: skip
    assert first.settings["model"]["dtype"] == "float32"
    assert {**first.settings["model"], "dtype": "bfloat16"} == second.settings["model"]
    (other,) = make_judges(dataclasses.replace(settings, judges=[f"polyguard={model}"]))
    assert other.settings["model"]["wording"] != first.settings["model"]["wording"]


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system messages') }}{% endif %}"
    folder = save_model(tmp_path / "strict")
    template = folder / "chat_template.jinja"
    template.write_text(refusing + template.read_text(encoding="utf-8"), encoding="utf-8")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "bag"}]
    rows = write_jsonl(tmp_path / "asked.jsonl", [{"id": "one", "prompt": {"en": turns}}])
    assert main(["evaluate", f"--models={folder}", f"--prompts={rows}", f"--out={tmp_path / 'out'}", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "prompts: 'one' (en) of the set 'asked': the chat template of the model refuses this prompt" in error
    assert "No system messages" in error
    # The response of a judge that gets such a message.
    (tmp_path / "plain.jsonl").write_text('{"prompt": {"en": "bag"}}\n')
    args = ["evaluate", "--models=http://h/v1#m", f"--prompts={tmp_path / 'plain.jsonl'}", f"--judges=llm={folder}"]
    assert main([*args, f"--out={tmp_path / 'out'}", *QUICK]) == 2
    assert "judges: the chat template of the model refuses this prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
