"""Commands that are stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from lightning_mlc.cli import main
from lightning_mlc.commands.stopping import stoppable
from lightning_mlc.errors import Interrupted
from lightning_mlc.lint.fixing import Fixer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_in_order(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": {"en": "Where is it?"}}))
    write = Fixer.write

    def stop(self: Fixer, *args: object) -> None:
        write(self, *args)  # type: ignore[arg-type]
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Fixer, "write", stop)
    before = signal.getsignal(number)
    options = ["--fix", "--out", str(tmp_path / "b.jsonl"), "--only", "copy"]
    assert main(["lint", str(path), *options]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "error: stopped; nothing was written"
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]  # and nothing unfinished
    assert signal.getsignal(number) is before


def test_other_threads_cannot_listen() -> None:
    found: list[BaseException] = []

    def run() -> None:
        try:
            with stoppable("stopped"):
                raise KeyboardInterrupt
        except Interrupted as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert str(found[0]) == "stopped"
