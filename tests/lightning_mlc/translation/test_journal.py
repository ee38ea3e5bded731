"""The journal of a translation: attempts, rounds, settings and other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mlc.errors import UserError
from lightning_mlc.translation.journal import TranslationJournal
from lightning_mlc.translation.languages import language_of
from lightning_mlc.translation.texts import Reply, Text


def text(content: str = "Hello", target: str = "sw") -> Text:
    return Text(content, language_of("en"), language_of(target))


def note(journal: TranslationJournal, one: Text, translation: str | None) -> None:
    reply = Reply(translation) if translation is not None else Reply(None, "refused")
    journal.add(journal.job(one), journal.result(one, reply))


def has(journal: TranslationJournal, one: Text, attempt: int) -> bool:
    journal.attempt = attempt
    return journal.has(journal.job(one))


def test_each_attempt_is_made_once_whenever_the_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with TranslationJournal(path, {}) as journal:
        note(journal, text("good"), "nzuri")
        note(journal, text("bad"), None)
    with TranslationJournal(path, {}) as journal:
        assert [has(journal, text(word), 1) for word in ("good", "bad", "new")] == [True, True, False]
        assert [has(journal, text(word), 2) for word in ("good", "bad")] == [True, False]
        assert [journal.needs_second(text(word)) for word in ("good", "bad")] == [False, True]
        journal.attempt = 2
        note(journal, text("bad"), "mbaya")
    with TranslationJournal(path, {}) as journal:
        assert has(journal, text("bad"), 2)
        assert has(journal, text("bad"), 1)
        assert journal.needs_second(text("bad"))  # it had one: the same batches are planned again
        assert journal.known(text("bad"))["translation"] == "mbaya"
        assert journal.back(text("bad")) == Text("mbaya", language_of("sw"), language_of("en"))


def test_texts_languages_and_settings_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with TranslationJournal(path, {"model": "a"}) as journal:
        note(journal, text(), "Habari")
        assert not has(journal, text(target="ur"), 1)
        assert not has(journal, Text("Hello", language_of("fr"), language_of("sw")), 1)
    with TranslationJournal(path, {"model": "b"}) as journal:
        assert not has(journal, text(), 1)
        note(journal, text(), "Jambo")
    for model, translation in (("a", "Habari"), ("b", "Jambo")):
        with TranslationJournal(path, {"model": model}) as journal:
            assert journal.known(text())["translation"] == translation


def test_a_translation_is_read_from_the_disk_however_lines_follow(tmp_path: Path) -> None:
    """In memory are no translations. Texts of several bytes a letter are written between two readings."""
    path = tmp_path / "journal.jsonl"
    words = {f"word {n}": "سلام " * n + "é" for n in range(1, 30)}
    with TranslationJournal(path, {}) as journal:
        for word, translation in words.items():
            note(journal, text(word), translation)
            assert journal.known(text("word 1"))["translation"] == words["word 1"]
        assert journal.records == {}
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"set": "cut')  # by a process that was killed
    with TranslationJournal(path, {}) as journal:
        note(journal, text("new"), "mpya")
        assert [journal.known(text(word))["translation"] for word in words] == list(words.values())
        assert journal.known(text("new"))["translation"] == "mpya"
    assert path.read_bytes().startswith(whole + b'{"set": "')
    assert path.read_bytes().count(b"\n") == len(words) + 1


def test_a_language_is_done_again_once_for_each_round(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with TranslationJournal(path, {}) as journal:
        note(journal, text(), "Habari")
        note(journal, text(target="ur"), "سلام")
        journal.begin_rounds(["sw"])
        assert (has(journal, text(), 1), has(journal, text(target="ur"), 1)) == (False, True)
        note(journal, text(), "Jambo")
    with TranslationJournal(path, {}) as journal:
        journal.begin_rounds(["sw"])  # the same command, after a stop
        assert has(journal, text(), 1)
        journal.end_rounds(["sw", "ur"])
    with TranslationJournal(path, {}) as journal:
        assert journal.known(text())["translation"] == "Jambo"
        journal.begin_rounds(["sw"])  # the same command, after it was complete
        assert not has(journal, text(), 1)


def test_a_journal_of_other_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with TranslationJournal(path, {}) as journal:
        journal.require_data([])
        journal.begin_rounds(["sw"])
        journal.require_data([text("new").id])
        note(journal, text(), "Habari")
    with TranslationJournal(path, {"model": "other"}) as journal:
        journal.require_data([text("new").id, text().id])  # more rows than before
        with pytest.raises(UserError, match=r"out: .*journal.jsonl is the journal of other data; give another --out"):
            journal.require_data([text("new").id])


def test_lines_are_on_the_disk_when_they_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    sizes: list[int] = []
    monkeypatch.setattr("os.fsync", lambda _: sizes.append(path.stat().st_size))
    with TranslationJournal(path, {}) as journal:
        note(journal, text(), "Habari")
        note(journal, text("b"), "b")
        assert len(sizes) >= 2
        assert 0 < sizes[-2] < sizes[-1] == path.stat().st_size
