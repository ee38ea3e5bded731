"""Errors for users: an option, a text, and no message that is too long to read."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_mlc.errors import (
    LONGEST_REASON,
    CheckpointError,
    Interrupted,
    UserError,
    first_line,
    moved,
    renamed,
    shortened,
    some_of,
)
from lightning_mlc.evaluation.journal import Job, Journal, Key
from lightning_mlc.evaluation.phases import fill
from lightning_mlc.evaluation.systems.chat_completion import Refused
from lightning_mlc.evaluation.systems.endpoint import Endpoint, EndpointGenerator

LONGEST = 300
"""Number of characters in a message that users read completely."""


def test_an_error_reads_as_its_option_then_its_text() -> None:
    assert str(UserError("model.lora.r", "must be at least 1, got 0")) == "model.lora.r: must be at least 1, got 0"
    assert str(UserError(None, "stopped by a signal")) == "stopped by a signal"


def test_an_error_crosses_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(Interrupted("out", "stopped")))
    assert (type(error), error.option, error.text) == (Interrupted, "out", "stopped")


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("model.objective", "place[1]"),
        ("model.objective.beta", "place[1].beta"),
        ("model.objective[0]", "place[1][0]"),
        ("model.objectives", "model.objectives"),
        ("data.train_path", "data.train_path"),
        (None, "place[1]"),
    ],
)
def test_an_error_moves_with_its_option(option: str | None, found: str) -> None:
    with pytest.raises(Interrupted) as error, moved("model.objective", "place[1]"):
        raise Interrupted(option, "stopped")
    assert (error.value.option, error.value.text) == (found, "stopped")


def test_a_renamed_error_keeps_its_kind_and_is_printed_once() -> None:
    shared = CheckpointError("checkpoint", "no room")
    shared.is_shared = True
    with pytest.raises(CheckpointError, match="models: no room") as error, renamed(("checkpoint",), "models"):
        raise shared
    assert error.value.is_shared
    with pytest.raises(CheckpointError, match="checkpoint: no room"), renamed(("other",), "models"):
        raise shared


def test_another_librarys_message_is_cut() -> None:
    line = first_line(ValueError("x" * 7000 + "\nmore"))
    assert len(line) == LONGEST_REASON
    assert line.endswith("xxx ...")
    assert first_line(ValueError("  short\nmore")) == "short"
    assert first_line(ValueError()) == "ValueError"


def test_of_many_parts_those_are_shown_that_there_is_room_for() -> None:
    assert some_of(["one", "two"], 20) == "one, two"
    assert some_of(["one", "two", "three"], 8) == "one, two, 1 more"
    assert some_of(["x" * 50, "two", "three"], 20, "; ") == f"{'x' * 16} ...; 2 more"
    assert some_of([], 20) == ""
    assert shortened("x" * 60) == "x" * 60
    assert len(shortened("x" * 61)) == 60


LONG = "long " * 200


def of_a_journal_of_other_settings(folder: Path) -> None:
    path = folder / "verdicts-refusal.jsonl"
    with Journal(path, {f"a setting {i}": f"{i} {LONG}" for i in range(40)}) as journal:
        journal.add(Job(Key(LONG, LONG, "en"), "x"), {})
    with Journal(path, {f"a setting {i}": f"{i + 1} {LONG}" for i in range(40)}):
        pass


def of_a_journal_of_other_texts(folder: Path) -> None:
    with Journal(folder / "verdicts-refusal.jsonl", {}) as journal:
        journal.add(Job(Key(LONG, LONG, "en"), "x"), {})
        journal.has(Job(Key(LONG, LONG, "en"), "y"))


def failing(status: int, **details: Any) -> Any:
    """An endpoint that fails in many ways, each with a long message."""
    count = iter(range(1000))

    def send(*_: Any) -> Any:
        number = next(count)
        raise Refused(status, {}, {key: f"{value} {number} {LONG}" for key, value in details.items()})

    return send


def of_an_endpoint(folder: Path, status: int) -> None:
    generator = EndpointGenerator(Endpoint(f"https://host.example/v1#{'m' * 40}", 8, retries=0, concurrency=2))
    generator._send = failing(status, code="code", type="type", param="param")  # type: ignore[method-assign]
    jobs = [Job(Key(LONG, f"{i} {LONG}", "en"), "x") for i in range(12)]

    def produce(done: Collection[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        texts: Any = [[{"role": "user", "content": LONG}]] * len(jobs)
        for index, response in generator.generate(texts, done):
            yield index, {"response": response.text}

    with Journal(folder / "responses.jsonl", {}) as journal:
        fill(journal, jobs, produce, f"a model of a long name {LONG}: generate", Console(stderr=True))


@pytest.mark.parametrize(
    "told",
    [
        of_a_journal_of_other_settings,
        of_a_journal_of_other_texts,
        lambda folder: of_an_endpoint(folder, 503),
        lambda folder: of_an_endpoint(folder, 400),
        lambda folder: of_an_endpoint(folder, 401),
        lambda folder: of_an_endpoint(folder, 302),
    ],
    ids=["settings", "texts", "unanswered", "declined", "refused", "redirected"],
)
def test_no_message_is_longer_than_anybody_reads(told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        told(Path("runs/evaluation/model"))
    assert len(str(error.value)) <= LONGEST
    assert len(str(error.value).splitlines()) == 1
