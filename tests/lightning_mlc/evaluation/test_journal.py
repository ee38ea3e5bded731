"""The journal: what a killed process leaves behind, and records that are refused because they must not be mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import Job, Journal, Key, digest


def job(number: int, text: str = "text") -> Job:
    return Job(Key("set", f"r{number}", "sw"), digest(text))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_records_are_one_line_each_and_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "responses.jsonl"
    with Journal(path, {"model": "m"}) as journal:
        journal.add(job(1), {"response": "habari\nyako \u2028 ndugu"})
    assert lines(path) == [
        {"set": "set", "id": "r1", "language": "sw", "input": digest("text"), "response": "habari\nyako \u2028 ndugu"}
    ]
    with Journal(path, {"model": "m"}) as journal:
        assert journal.has(job(1))
        assert not journal.has(job(2))
        journal.add(job(2), {"response": ""})
    assert [record["id"] for record in lines(path)] == ["r1", "r2"]


def test_half_a_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path, {}) as journal:
        journal.add(job(1), {"response": "a"})
        journal.add(job(2), {"response": "जवाब"})
    whole = path.read_bytes()
    for cut in (1, 2, 5, 40):  # inside the newline, inside a character of three bytes, ...
        path.write_bytes(whole[:-cut])
        with Journal(path, {}) as journal:
            assert (journal.has(job(1)), journal.has(job(2))) == (True, False)
            journal.add(job(2), {"response": "जवाब"})
        assert path.read_bytes() == whole


def test_a_killed_writer_loses_nothing_that_it_was_told_is_written(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    code = (
        "import sys; from lightning_mlc.evaluation.journal import *\n"
        f"with Journal(__import__('pathlib').Path({str(path)!r}), {{}}) as journal:\n"
        "    for number in range(10**6):\n"
        "        journal.add(Job(Key('s', str(number), 'en'), 'x'), {'response': 'y' * 50})\n"
        "        print(number, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(200)]
    os.kill(process.pid, signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    told = [line for line in said if line.endswith("\n")]
    with Journal(path, {}) as journal:
        assert len(journal.records) >= len(told) >= 200


@pytest.mark.parametrize(
    ("begun", "now", "named"),
    [
        ({"max_new_tokens": 48}, {"max_new_tokens": 64}, "max_new_tokens: 48 before, 64 now"),
        ({"model": {"files": "a"}}, {"model": {"files": "b"}}, "model"),
        ({}, {"engine": "vllm"}, "engine: None before, vllm now"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, begun: dict[str, object], now: dict[str, object], named: str
) -> None:
    path = tmp_path / "responses.jsonl"
    with Journal(path, begun) as journal:
        journal.add(job(1), {})
    before = path.read_bytes()
    with pytest.raises(UserError, match="made with other settings") as refused, Journal(path, now):
        pass
    assert named in str(refused.value)
    assert path.read_bytes() == before


def test_settings_may_change_while_there_is_no_record(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl", {"x": 1}):
        pass
    with Journal(tmp_path / "a.jsonl", {"x": 2}) as journal:
        journal.add(job(1), {})
    with pytest.raises(UserError, match="x: 2 before, 1 now"), Journal(tmp_path / "a.jsonl", {"x": 1}):
        pass


def test_another_text_under_the_same_id_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl", {}) as journal:
        journal.add(job(1), {})
        with pytest.raises(UserError, match=r"'r1' \(sw\) of the set 'set' that was computed from another text"):
            journal.has(job(1, "changed"))


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        Journal(tmp_path / "a.jsonl", {}),
        pytest.raises(UserError, match="another process is writing"),
        Journal(tmp_path / "a.jsonl", {}),
    ):
        pass


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, {}) as journal:
        journal.add(job(1), {})
    path.write_bytes(path.read_bytes() + b"{nonsense}\n" + b'{"set": 1}\n')
    with pytest.raises(UserError, match="line 2 is damaged"), Journal(path, {}):
        pass


def test_settings_and_records_of_another_shape_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, {}) as journal:
        journal.add(Job(Key("s", "i", "en"), "x"), {})
    path.write_text('{"set": "s", "id": "i", "language": "en"}\n')
    with pytest.raises(UserError, match="line 1 is damaged"), Journal(path, {}):
        pass
    path.with_suffix(".settings.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.settings\.json is damaged"), Journal(path, {}):
        pass


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write "), Journal(tmp_path / "file" / "a.jsonl", {}):
        pass


@pytest.mark.parametrize("left", [None, "{", "\ufffd"])
def test_records_of_unknown_settings_are_refused(tmp_path: Path, left: str | None) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, {"max_new_tokens": 4}) as journal:
        journal.add(Job(Key("s", "i", "en"), "x"), {})
    beside = path.with_suffix(".settings.json")
    if left is None:
        beside.unlink()
    else:
        beside.write_text(left, encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.settings\.json cannot be read"), Journal(path, {"max_new_tokens": 200}):
        pass


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, {}) as journal:
        journal.add(Job(Key("s", "i", "en"), "x"), {})
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 2 is damaged"), Journal(path, {}):
        pass


def test_a_full_disk_is_one_line_and_what_was_written_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    code = (
        "import resource, sys; from pathlib import Path; from lightning_mlc.evaluation.journal import *\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n"
        f"    with Journal(Path({str(path)!r}), {{}}) as journal:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "        for number in range(100):\n"
        "            journal.add(Job(Key('s', str(number), 'en'), 'x'), {'response': 'y' * 50})\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"out: cannot write {path} (File too large); ")
    assert done.stderr.count("\n") == 1
    with Journal(path, {}) as journal:
        assert 5 < len(journal.records) < 20
