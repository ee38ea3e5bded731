"""Errors that users read: an option, a text, and nothing of a length that nobody reads."""

from __future__ import annotations

import pickle

from lightning_mlc.errors import LONGEST_REASON, Interrupted, UserError, first_line


def test_an_error_reads_as_its_option_then_its_text() -> None:
    assert str(UserError("model.lora.r", "must be at least 1, got 0")) == "model.lora.r: must be at least 1, got 0"
    assert str(UserError(None, "stopped by a signal")) == "stopped by a signal"


def test_an_error_crosses_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(Interrupted("out", "stopped")))
    assert (type(error), error.option, error.text) == (Interrupted, "out", "stopped")


def test_another_librarys_message_is_cut() -> None:
    line = first_line(ValueError("x" * 7000 + "\nmore"))
    assert len(line) == LONGEST_REASON
    assert line.endswith("xxx ...")
    assert first_line(ValueError("  short\nmore")) == "short"
    assert first_line(ValueError()) == "ValueError"
