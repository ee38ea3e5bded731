"""``lightning-mlc translate`` from file to file: what it writes, what it says, what it survives."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model, write_jsonl

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_endpoint import Answer, completion, failure, serve
from translators import (
    SAMPLE,
    asked_code,
    english_rows,
    holds,
    is_second,
    save_nllb,
    translate_from_sample,
)

from lightning_mlc.cli import main
from lightning_mlc.commands.translate import FORMS, parse
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.translation.destination import destination
from lightning_mlc.translation.rows import PROVENANCE
from lightning_mlc.translation.settings import TranslationSettings

ROOT = Path(__file__).parents[3]
LANGUAGES = ("sw", "ur", "zh-Hans")
IN_SAMPLE = {"zh-Hans": "zh"}
QUICK = ["--device=cpu", "--max_new_tokens=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "chat", initializer_range=0.5)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "english.jsonl", english_rows(6))


def command(data: Path | str, out: Path, spec: object, *more: str) -> list[str]:
    return ["translate", str(data), "--languages", *LANGUAGES, "--out", str(out), f"--model={spec}", *more]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def without_dates(path: Path) -> list[dict[str, Any]]:
    rows = rows_of(path)
    for row in rows:
        for entry in row[PROVENANCE].values():
            del entry["date"]
    return rows


def by_heart(text: str, before: int) -> Answer:
    return translate_from_sample(text)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that is refused, which writes nothing."""
    assert main(list(args)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not [line for line in lines if "Traceback" in line]
    return lines[-1].removeprefix("error: ")


# ---- what is written --------------------------------------------------------------------------------


def test_prompts_are_translated_and_everything_else_stays(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.jsonl"
    with serve(by_heart) as served:
        assert main(command(data, out, f"{served.url}#gpt")) == 0
    told = capsys.readouterr()
    assert told.err.startswith("6 prompts, 18 translations: none leaves this machine, they are sent to 127.0.0.1\n")
    before = {row["id"]: row for row in SAMPLE}
    for row in rows_of(out):
        own = before[row["id"]]
        provenance = row.pop(PROVENANCE)
        prompt = row.pop("prompt")
        assert row == {key: value for key, value in own.items() if key != "prompt"}
        assert prompt == {"en": own["prompt"]["en"]} | {
            code: own["prompt"][IN_SAMPLE.get(code, code)] for code in LANGUAGES
        }
        assert provenance.keys() == set(LANGUAGES)
        for entry in provenance.values():
            assert entry.pop("date").count("-") == 2
            assert entry == {"translator": "openai", "model": "gpt", "host": "127.0.0.1"}
    assert len(served.bodies) == 18
    assert {body["temperature"] for body in served.bodies} == {0}
    assert not [
        response for row in SAMPLE for response in (row["chosen"], row["rejected"]) if response in str(served.bodies)
    ]
    examples = list(parse_rows(read_rows(str(out), "file"), "en"))
    assert [set(example.prompts) for example in examples] == [{"en", *LANGUAGES}] * 6
    assert "6 rows, 24 texts, 4 languages" in told.out  # lint
    texts = [text for row in SAMPLE for text in [*row["prompt"].values(), row["chosen"], row["rejected"]]]
    assert not [text for text in texts if text in told.out + told.err]


def test_failures_become_null_with_a_reason_and_are_counted_by_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refusals, answers, replies in the source language, other forms and lint errors; one retry in other words."""
    rows = [*english_rows(5, "harmful"), *english_rows(3, "ordinary")]
    texts = [row["prompt"]["en"] for row in rows]
    data, out = write_jsonl(tmp_path / "english.jsonl", rows), tmp_path / "out.jsonl"

    def reply(content: str, before: int) -> Answer:
        number = next(i for i, text in enumerate(texts) if holds(content, text))
        if "into Swahili" not in content:
            return translate_from_sample(content)
        wrong = {
            0: "I'm sorry, but I can't help with that.",
            1: json.dumps({"code": asked_code(content), "translation": "Samahani, siwezi kukusaidia na hilo."}),
            2: json.dumps({"code": asked_code(content), "translation": texts[number]}),
            3: f"Translation: {SAMPLE[0]['prompt']['sw']}",
            4: json.dumps({"code": asked_code(content), "translation": SAMPLE[0]["prompt"]["ru"]}, ensure_ascii=False),
        }
        if number in wrong:
            return completion(wrong[number])
        if number == 5 and not is_second(content):
            return completion("{")
        if number == 6:
            return completion('{"code": "', finish_reason="length")
        return translate_from_sample(content)

    with serve(reply) as served:
        assert main(["translate", str(data), "--languages", "sw", "ur", f"--out={out}", f"--model={served.url}#m"]) == 0
    found = {row["id"]: row for row in rows_of(out)}
    failures = [found[row["id"]][PROVENANCE]["sw"].get("failed") for row in rows]
    assert failures == [
        "refused", "refused", "in the source language", "not the JSON that was asked for",
        "lint: language", None, "cut off", None,
    ]  # fmt: skip
    assert [found[row["id"]]["prompt"]["sw"] is None for row in rows] == [reason is not None for reason in failures]
    assert not any("failed" in row[PROVENANCE]["ur"] for row in found.values())
    asked = Counter(is_second(body["messages"][-1]["content"]) for body in served.bodies)
    assert asked == {False: 16, True: 7}
    told, last = capsys.readouterr()
    assert last.splitlines()[-1] == (
        "warning: 6 of 16 translations failed and are null: sw 6; translate them with another model (--only_missing)"
    )
    (line,) = [line.split() for line in told.splitlines() if line.startswith("sw ")]
    assert line == ["sw", "2", "of", "8", "5", "of", "5", "1", "of", "3"]
    assert "refused 2" in told
    assert "warning: sw: 100% of the harmful prompts failed and 33% of the ordinary ones" in told


def test_a_language_without_any_translation_is_status_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file and the report are written all the same. A second model decides whether the language is still lost."""
    first, second, third = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "third"))

    def reluctant(content: str, before: int) -> Answer:
        number = next(i for i, row in enumerate(SAMPLE[:6]) if holds(content, row["prompt"]["en"]))
        if "into Urdu" in content:
            return completion("I can't help with that." if number else "{")
        if "into Simplified Chinese" in content:
            return completion("[]")
        return completion("I can't help with that.") if number == 5 else translate_from_sample(content)

    with serve(reluctant) as served:
        assert main(command(data, first, f"{served.url}#reluctant")) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == (
        "error: no prompt was translated into ur (most often: refused), zh-Hans (most often: not the JSON that was "
        "asked for); translate them with another model (--only_missing)"
    )
    assert f"wrote\n  {first}\n" in told.out
    assert "ur 0 of 6" in " ".join(told.out.split())
    assert [row["prompt"]["sw"] is None for row in rows_of(first)] == [False] * 5 + [True]

    def better(content: str, before: int) -> Answer:
        no = "into Urdu" in content and not holds(content, SAMPLE[0]["prompt"]["en"])
        return completion("I can't help with that.") if no else translate_from_sample(content)

    with serve(better) as served:
        assert main(command(first, second, f"{served.url}#better", "--only_missing")) == 0
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("warning: 5 of 13 translations failed and are null: ur 5;")
    )
    with serve(lambda content, before: completion("I can't help with that.")) as served:
        assert main(command(second, third, f"{served.url}#none", "--only_missing")) == 0
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith("warning: 5 of 5 translations failed and are null: ur 5;")
    assert "no prompt was translated" not in told.out


def test_a_slow_limited_and_broken_endpoint_is_asked_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answers: dict[int, Callable[[str], Answer]] = {
        0: lambda text: failure(429, {"Retry-After": "0.02"}),
        1: lambda text: (200, {}, "not JSON"),
        2: lambda text: failure(503, {"Retry-After": "0"}),
    }

    def behaviour(text: str, before: int) -> Answer:
        time.sleep(0.01)
        return answers.get(before, translate_from_sample)(text)

    with serve(behaviour) as served:
        assert main(command(data, out, f"{served.url}#m")) == 0
    assert set(served.asked.values()) == {4}
    assert all(row["prompt"][code] for row in rows_of(out) for code in LANGUAGES)


def test_what_an_endpoint_did_not_answer_is_asked_for_by_the_next_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    silent = SAMPLE[2]["prompt"]["en"]

    def behaviour(text: str, before: int) -> Answer:
        return failure(500) if holds(text, silent) and "Urdu" in text else translate_from_sample(text)

    with serve(behaviour) as served:
        told = refused(capsys, *command(data, out, f"{served.url}#m", "--retries=0"))
        assert "1 of 18 requests got no answer (1 times status 500); run the same command again" in told
        assert not out.exists()
        answered = len(served.bodies)
    journal = tmp_path / "out.jsonl.journal.jsonl"
    port = served.url.rpartition(":")[2].removesuffix("/v1")
    with serve(by_heart) as again:
        # The journal belongs to an address, and the next server has another port.
        journal.write_text(journal.read_text().replace(port, again.url.rpartition(":")[2].removesuffix("/v1")))
        assert answered == 18
        assert len(rows_of(journal)) == 17


def test_several_turns_keep_their_order_and_answers_stay(tmp_path: Path) -> None:
    first, second = SAMPLE[0]["prompt"], SAMPLE[1]["prompt"]
    turns = [
        {"role": "system", "content": SAMPLE[2]["prompt"]["en"]},
        {"role": "user", "content": first["en"]},
        {"role": "assistant", "content": "An answer that nobody translates."},
        {"role": "user", "content": second["en"]},
    ]
    data = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": {"en": turns}, "chosen": "a", "rejected": "b"}])
    with serve(by_heart) as served:
        for name, more in (("plain", []), ("system", ["--system"])):
            out = tmp_path / f"{name}.jsonl"
            args = ["translate", str(data), "--languages=sw", f"--out={out}", f"--model={served.url}#m", *more]
            assert main(args) == 0
    for name, system in (("plain", turns[0]["content"]), ("system", SAMPLE[2]["prompt"]["sw"])):
        (row,) = rows_of(tmp_path / f"{name}.jsonl")
        assert [turn["content"] for turn in row["prompt"]["sw"]] == [
            system, first["sw"], "An answer that nobody translates.", second["sw"],
        ]  # fmt: skip
    assert "An answer that nobody translates." not in str(served.bodies)


def test_the_same_prompt_is_translated_once(tmp_path: Path) -> None:
    rows = [{**english_rows(1)[0], "id": str(number)} for number in range(3)]
    out = tmp_path / "out.jsonl"
    with serve(by_heart) as served:
        assert main(command(write_jsonl(tmp_path / "a.jsonl", rows), out, f"{served.url}#m")) == 0
    assert len(served.bodies) == len(LANGUAGES)
    assert [row["prompt"]["sw"] for row in rows_of(out)] == [SAMPLE[0]["prompt"]["sw"]] * 3


# ---- what is there already --------------------------------------------------------------------------


def test_translations_of_the_data_are_kept_or_replaced_as_the_user_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = english_rows(3)
    rows[1]["prompt"]["sw"] = "Tafsiri ya mtu."
    rows[1][PROVENANCE] = {"sw": {"translator": "a person"}}
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    with serve(by_heart) as served:

        def args(name: str, *more: str) -> list[str]:
            return command(data, tmp_path / name, f"{served.url}#m", *more)

        told = refused(capsys, *args("a.jsonl"))
        assert "has 1 prompts in 'sw' already; give --only_missing to keep them, or --redo sw to translate" in told
        assert not served.bodies
        assert main(args("kept.jsonl", "--only_missing")) == 0
        assert len(served.bodies) == 8
        assert main(args("redone.jsonl", "--redo", "sw")) == 0
    kept, redone = rows_of(tmp_path / "kept.jsonl")[1], rows_of(tmp_path / "redone.jsonl")[1]
    assert kept["prompt"]["sw"] == "Tafsiri ya mtu."
    assert kept[PROVENANCE]["sw"] == {"translator": "a person"}
    assert kept["prompt"]["ur"] == SAMPLE[1]["prompt"]["ur"]
    assert redone["prompt"]["sw"] == SAMPLE[1]["prompt"]["sw"]
    assert redone[PROVENANCE]["sw"]["translator"] == "openai"


def test_a_complete_run_asks_for_nothing_and_redo_asks_for_one_language(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with serve(by_heart) as served:
        args = command(data, out, f"{served.url}#m")
        asked = []
        for more in ([], [], ["--redo=ur"], [], ["--redo=ur"]):
            before = len(served.bodies)
            assert main([*args, *more]) == 0
            asked.append(len(served.bodies) - before)
    assert asked == [18, 0, 6, 0, 6]


def test_failed_prompts_can_be_given_to_another_model(data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"

    def reluctant(text: str, before: int) -> Answer:
        no = "Urdu" in text and holds(text, SAMPLE[0]["prompt"]["en"])
        return completion("I cannot help with that.") if no else translate_from_sample(text)

    with serve(reluctant) as served:
        assert main(command(data, first, f"{served.url}#reluctant")) == 0
    with serve(by_heart) as served:
        assert main(command(first, second, f"{served.url}#willing", "--only_missing")) == 0
    assert len(served.bodies) == 1
    row = rows_of(second)[0]
    assert row["prompt"]["ur"] == SAMPLE[0]["prompt"]["ur"]
    assert [row[PROVENANCE][code]["model"] for code in LANGUAGES] == ["reluctant", "willing", "reluctant"]
    assert "failed" not in row[PROVENANCE]["ur"]


def test_back_translation_scores_each_translation(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu")
    out = tmp_path / "out.jsonl"
    changed, lost = SAMPLE[0]["prompt"], SAMPLE[1]["prompt"]

    def behaviour(text: str, before: int) -> Answer:
        if "into English" in text and holds(text, changed["sw"]):
            other = json.dumps({"code": asked_code(text), "translation": SAMPLE[3]["prompt"]["en"]})
            return completion(other)
        return completion("?") if "into English" in text and holds(text, lost["sw"]) else translate_from_sample(text)

    with serve(behaviour) as served:
        assert main(command(data, out, f"{served.url}#m", "--verify=back")) == 0
    assert len(served.bodies) == 36 + 1
    scores = [[row[PROVENANCE][code]["chrf"] for code in LANGUAGES] for row in rows_of(out)]
    assert scores[2:] == [[100.0] * 3] * 4
    assert 0 < scores[0][0] < 50
    assert scores[1] == [None, 100.0, 100.0]
    told = capsys.readouterr()
    assert "18 translations, and as many back" in told.err
    assert "sw: 1 could not be translated back" in told.out


# ---- nothing leaves the machine unasked -------------------------------------------------------------


def test_no_other_machine_is_asked_unless_it_is_allowed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("OPENAI_API_KEY_NOWHERE_EXAMPLE", "key-of-nowhere")
    with serve(by_heart) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        for allowed in ([], ["--allow_remote", "elsewhere.example", "example"]):
            told = refused(capsys, *command(data, out, "http://nowhere.example/v1#m", *allowed))
            assert told == (
                "model: nowhere.example is not this machine, and 6 prompts would be sent there; "
                "allow it with --allow_remote nowhere.example"
            )
        assert not proxy.bodies
        assert not list(tmp_path.glob("out*"))
        # A proxy stands in for the other machine.
        assert main(command(data, out, "http://nowhere.example/v1#m", "--allow_remote", "nowhere.example")) == 0
        assert capsys.readouterr().err.splitlines()[0] == (
            "6 prompts, 18 translations: all are sent to nowhere.example, "
            "through the proxy 127.0.0.1 of the environment"
        )
        assert len(proxy.bodies) == 18
        assert {headers["Authorization"] for headers in proxy.headers} == {"Bearer key-of-nowhere"}
    written = out.read_text() + (tmp_path / "out.jsonl.journal.jsonl").read_text()
    assert "key-of-nowhere" not in written


def test_a_proxy_that_could_read_prompts_must_be_allowed_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("ALL_PROXY", "user:password@relay.example:3128")
    allowed = ["--allow_remote", "nowhere.example"]
    told = refused(capsys, *command(data, tmp_path / "out.jsonl", "http://nowhere.example/v1#m", *allowed))
    assert told == (
        "model: the proxy relay.example of the environment would read 6 prompts, because nowhere.example has no https; "
        "allow it with --allow_remote relay.example"
    )
    both = [*allowed, "relay.example"]
    assert destination("http://nowhere.example/v1#m", "6 prompts", both[1:]).endswith(
        "through the proxy relay.example of the environment"
    )
    # It only passes on what is encrypted.
    assert "relay.example" in destination("https://nowhere.example/v1#m", "6 prompts", allowed[1:])


# ---- models of this machine -------------------------------------------------------------------------


def test_a_local_chat_model_and_a_translation_model_run_from_file_to_file(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random models translate nearly nothing, and every row says so."""
    nllb = save_nllb(tmp_path / "nllb")
    for name, spec in (("chat", model), ("nllb", nllb)):
        out = tmp_path / f"{name}.jsonl"
        status = main(command(data, out, spec, *QUICK))
        assert status == any(all(row["prompt"][code] is None for row in rows_of(out)) for code in LANGUAGES)
        assert name == "nllb" or status == 1
        assert f"none leaves this machine, {spec} runs here" in capsys.readouterr().err
        for row in rows_of(out):
            for code in LANGUAGES:
                entry = row[PROVENANCE][code]
                assert (entry["translator"], entry["model"]) == ("transformers", spec.name)
                assert (row["prompt"][code] is None) == ("failed" in entry)
                assert name == "nllb" or entry["failed"] in ("cut off", "not the JSON that was asked for")


def test_code_of_a_model_runs_only_if_it_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ran = save_model(tmp_path / "own"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(ran)!r}).touch()\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    out = tmp_path / "out.jsonl"
    told = refused(capsys, *command(data, out, folder, *QUICK))
    assert told.startswith("model: cannot load a configuration from")
    assert not ran.exists()
    main(command(data, out, folder, "--trust_remote_code", *QUICK))  # there is no class of weights for it
    assert ran.exists()


# ---- what is survived -------------------------------------------------------------------------------


def start(args: list[str], limit: str = "") -> subprocess.Popen[str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    code = f"import sys; {limit}from lightning_mlc.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def kill_after(lines: int, args: list[str], journal: Path) -> None:
    """Start the command, and kill it once its journal has so many lines more than before."""
    before = journal.read_bytes().count(b"\n") if journal.exists() else 0
    process = start(args)
    until = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < before + lines:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["endpoint", "chat"])
def test_killed_twice_and_resumed_is_as_if_it_had_not_been(kind: str, model: Path, data: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    journal = tmp_path / "resumed.jsonl.journal.jsonl"
    hard = SAMPLE[3]["prompt"]["en"]
    pace = threading.Event()

    def behaviour(text: str, before: int) -> Answer:
        if pace.is_set():
            time.sleep(0.05)
        return completion("?") if holds(text, hard) else translate_from_sample(text)

    with serve(behaviour) as served:
        spec = f"{served.url}#m" if kind == "endpoint" else model
        more = ["--concurrency=2", "--batch_tokens=4000", "--device=cpu", "--max_new_tokens=8"]
        status = int(kind == "chat")  # the random model translates nothing
        assert main(command(data, whole, spec, *more)) == status
        served.asked.clear()
        pace.set()
        for _ in range(2):
            kill_after(5, command(data, resumed, spec, *more), journal)
            assert not resumed.exists()
        told = journal.read_bytes()
        recorded = [json.loads(line) for line in told.split(b"\n")[:-1]]
        assert main(command(data, resumed, spec, *more)) == status
    assert without_dates(resumed) == without_dates(whole)
    assert len(recorded) >= 10
    lines = rows_of(journal)
    assert lines[: len(recorded)] == recorded  # nothing was lost
    attempts = Counter((line["id"], line["language"], line["attempt"]) for line in lines)
    assert set(attempts.values()) == {1}  # nothing was done twice
    if kind == "endpoint":
        # Of each kill, the two requests that were under way.
        assert sum(served.asked.values()) <= 18 + 3 + 2 * 2
    assert not list(tmp_path.glob(".*unfinished"))


@pytest.mark.slow
def test_killed_while_a_language_is_done_again(data: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal.jsonl"
    pace = threading.Event()

    def behaviour(text: str, before: int) -> Answer:
        if pace.is_set():
            time.sleep(0.1)
        return translate_from_sample(text)

    with serve(behaviour) as served:
        args = command(data, out, f"{served.url}#m", "--concurrency=1")
        assert main(args) == 0
        complete, complete_rows = out.read_bytes(), [json.dumps(row) for row in without_dates(out)]
        served.asked.clear()
        pace.set()
        kill_after(4, [*args, "--redo=ur"], journal)  # the round, and three texts
        assert out.read_bytes() == complete
        assert main([*args, "--redo=ur"]) == 0
        assert sum(served.asked.values()) <= 6 + 1
    assert without_dates(out) == [json.loads(line) for line in complete_rows]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_run_resumes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    limit = (
        # py3langid unpacks its model into a file first.
        "from lightning_mlc.translation.failures import prepare_checks; prepare_checks(); "
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY)); "
    )
    with serve(by_heart) as served:
        args = command(data, out, f"{served.url}#m", "--concurrency=1")
        process = start(args, limit)
        _, told = process.communicate(timeout=120)
        assert process.returncode == 2, told
        assert told.splitlines()[-1].startswith(f"error: out: cannot write {out}.journal.jsonl (File too large)")
        assert "Traceback" not in told
        assert not out.exists()
        before = len(served.bodies)
        assert 2 <= before < 18
        assert main(args) == 0
        assert len(served.bodies) - before == 18 - (before - 1)  # the last one found no room
    assert all(row["prompt"][code] for row in rows_of(out) for code in LANGUAGES)


# ---- what is refused --------------------------------------------------------------------------------


def test_what_is_wrong_is_one_line_and_leaves_nothing(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = save_model(tmp_path / "bare", template=None)
    no_tokenizer = save_model(tmp_path / "without")
    for path in no_tokenizer.glob("*token*"):
        path.unlink()
    swahili = write_jsonl(tmp_path / "swahili.jsonl", [{"prompt": {"sw": "Habari"}}])
    files = sorted(tmp_path.glob("*"))
    out = tmp_path / "out.jsonl"

    def told(*args: str, file: Path = data, spec: object = model, place: Path = out) -> str:
        return refused(capsys, "translate", str(file), f"--out={place}", f"--model={spec}", *args)

    assert "swahili.jsonl row 1: has no prompt in the source language 'en'" in told("--languages=fr", file=swahili)
    assert told("--languages", "sw", "en").startswith("languages: 'en' is the source language")
    assert told("--languages=xx-yy").startswith("languages: 'xx-yy' is not a language code")
    assert told("--languages=ku").startswith("languages: 'ku' does not say which script; write ckb")
    assert told("--languages=sw", "--redo=ur").startswith("redo: 'ur' is not one of --languages (sw)")
    assert "cannot load a tokenizer from" in told("--languages=sw", spec=no_tokenizer)
    assert told("--languages=sw", spec=no_tokenizer).startswith("model: ")
    assert "chat template" in told("--languages=sw", spec=bare)
    assert told("--languages=sw", spec="http://127.0.0.1/v1").startswith("model: write an endpoint as http://HOST/v1#")
    assert "there is no folder" in told("--languages=sw", spec="./nothing")
    assert told("--languages=sw", place=tmp_path / "o.csv").startswith("out: must be a .jsonl file")
    assert told("--languages=sw", place=data).startswith(f"out: {data} is the data itself")
    assert told("--languages=sw", place=swahili).startswith(f"out: {swahili} exists, and no translation wrote it")
    assert told("--languages=sw", file=tmp_path / "no.jsonl").startswith("file: there is no file")
    assert told("--languages=sw", "--batch_tokens=0") == "batch_tokens: must be at least 1, got 0"
    assert told("--languages=sw", "--langages=x") == "there is no option --langages; did you mean --languages?"
    assert refused(capsys, "translate", "--languages", "sw", str(data)).startswith("file: is not set; write it first")
    assert sorted(tmp_path.glob("*")) == files


def test_a_journal_of_other_data_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    others = write_jsonl(tmp_path / "others.jsonl", english_rows(12)[6:])
    with serve(by_heart) as served:
        assert main(command(data, out, f"{served.url}#m")) == 0
        before = out.read_bytes()
        told = refused(capsys, *command(others, out, f"{served.url}#m"))
    assert told.startswith(f"out: {out}.journal.jsonl is the journal of other data; give another --out")
    assert out.read_bytes() == before


def test_a_place_that_cannot_be_written_is_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    told = refused(capsys, *command(data, tmp_path / "file" / "out.jsonl", model, *QUICK))
    assert told.startswith("out: cannot write ")


def test_options_have_their_short_forms() -> None:
    kinds = typing.get_type_hints(TranslationSettings)
    assert set(FORMS.lists) == {name for name, kind in kinds.items() if kind == list[str]}
    assert set(FORMS.switches) == {name for name, kind in kinds.items() if kind is bool}
    words = ["f.jsonl", "--languages", "sw,ur", "zh-Hans", "--only_missing", "--out=o.jsonl", "--model", "m"]
    found = parse([*words, "--allow_remote", "a.example", "b.example"])
    assert dataclasses.asdict(found) == {
        **dataclasses.asdict(TranslationSettings("f.jsonl", ["sw", "ur", "zh-Hans"], "o.jsonl", "m")),
        "only_missing": True,
        "allow_remote": ["a.example", "b.example"],
    }
