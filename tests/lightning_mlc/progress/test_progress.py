"""Progress of work: when a line is printed, its content, and when there is a bar instead."""

from __future__ import annotations

import io
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lightning_mlc.progress import bars as progress
from lightning_mlc.progress.bars import SECONDS_OF_BAR, Track, duration, say, size, track
from lightning_mlc.progress.heartbeat import Heartbeat


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def followed(total: float, seconds_each: float, done: int = 0, figures: bool = False) -> list[str]:
    """Lines of ``total`` pieces of work, each of which takes ``seconds_each``."""
    stream, clock = io.StringIO(), Clock()
    with track("work", total, "pieces", done, console=Console(file=stream), clock=clock) as work:
        for index in range(done, int(total)):
            clock.now += seconds_each
            work.advance(figures=partial("loss {}.5".format, index + 1) if figures else None)
    return stream.getvalue().splitlines()


def done_in(lines: list[str]) -> list[int]:
    """Numbers of finished pieces in the lines between the first and the last."""
    return [int(line.removeprefix("work: ").split(" ")[0]) for line in lines[1:-1]]


def test_there_is_a_line_at_every_twentieth_of_quick_work() -> None:
    # 200 pieces of a second: a twentieth is 10 of them, which takes less than 30 seconds.
    assert done_in(followed(200, 1)) == list(range(10, 200, 10))


def test_there_is_a_line_every_thirty_seconds_of_long_work() -> None:
    # 2000 pieces of a second: a twentieth would be 100 of them.
    assert done_in(followed(2000, 1)) == list(range(30, 2000, 30))


def test_there_is_a_line_for_each_piece_that_takes_longer() -> None:
    assert done_in(followed(10, 100)) == list(range(1, 10))


def test_short_work_is_no_flood() -> None:
    # 80 pieces in 10 seconds: a twentieth takes half a second, but lines are at least five seconds apart.
    assert followed(80, 0.125) == [
        "work: 80 pieces",
        "work: 40 of 80 pieces, 5 s left",
        "work: 80 of 80 pieces in 10 s",
    ]


def test_work_of_a_moment_is_one_line() -> None:
    assert followed(100, 0.001) == ["work: 100 pieces"]


def test_a_line_says_how_much_is_done_the_figures_and_the_time_left() -> None:
    assert followed(4, 75, figures=True)[:2] == [
        "work: 4 pieces",
        "work: 1 of 4 pieces, loss 1.5, 3 min 45 s left",
    ]
    assert followed(4, 75)[-1] == "work: 4 of 4 pieces in 5 min 00 s"


def test_what_was_done_before_counts_and_takes_no_time() -> None:
    assert followed(10, 60, done=8) == [
        "work: 10 pieces, 8 of them done",
        "work: 9 of 10 pieces, 1 min 00 s left",
        "work: 10 of 10 pieces in 2 min 00 s",
    ]


def test_work_that_is_all_done_or_none_is_no_work() -> None:
    assert followed(3, 1, done=3) == ["work: 3 pieces, all of them done"]
    assert followed(0, 1) == []


def test_an_unknown_total_gives_lines_without_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with track("work", float("inf"), "pieces", console=Console(file=stream), clock=clock) as work:
        for _ in range(3):
            clock.now += 31
            work.advance()
    assert stream.getvalue().splitlines() == [
        "work begins",
        "work: 1 pieces",
        "work: 2 pieces",
        "work: 3 pieces",
        "work: 3 pieces in 1 min 33 s",
    ]


def test_part_of_a_piece_counts_for_the_time_alone() -> None:
    stream, clock = io.StringIO(), Clock()
    work = Track("work", 4, "pieces", 0, True, Console(file=stream), clock)
    clock.now += 40
    work.update(0.5)
    assert stream.getvalue().splitlines()[1] == "work: 0 of 4 pieces, 4 min 40 s left"


def test_work_that_takes_long_says_so_meanwhile() -> None:
    stream, clock = io.StringIO(), Clock()
    with track("training", 16, "steps", console=Console(file=stream), clock=clock) as work:
        clock.now += 10
        work.advance()
        for _ in range(70):
            clock.now += 1
            work.beat()
        work.advance()
    assert stream.getvalue().splitlines() == [
        "training: 16 steps",
        "training: 1 of 16 steps, 2 min 30 s left",
        "training: 1 of 16 steps, nothing new for 30 s",
        "training: 1 of 16 steps, nothing new for 1 min 00 s",
        "training: 2 of 16 steps, 9 min 20 s left",
        "training: 2 of 16 steps in 1 min 20 s",
    ]


def test_work_that_tells_of_itself_is_left_to() -> None:
    """Each step ends before a heartbeat would print a line, and the line of a finished step says more."""
    stream, clock = io.StringIO(), Clock()
    with track("training", 1000, "steps", console=Console(file=stream), clock=clock) as work:
        for _ in range(60):
            clock.now += 4
            work.beat()
            work.advance()
    assert not [line for line in stream.getvalue().splitlines() if "nothing new" in line]


def test_work_that_is_over_or_has_a_bar_says_nothing_more() -> None:
    stream, terminal, clock = io.StringIO(), io.StringIO(), Clock()
    with track("work", 4, console=Console(file=stream), clock=clock) as work:
        pass
    with track("work", 4, console=Console(file=terminal, force_terminal=True), clock=clock) as bar:
        clock.now += 100
        work.beat()
        bar.beat()
    assert stream.getvalue() == "work: 4\n"
    assert "nothing new" not in terminal.getvalue()


def test_work_within_delays_no_line_of_the_outer_that_has_something_to_tell() -> None:
    """Training that is validated every few seconds still reports its losses, but not that it waits for validation."""
    stream, clock = io.StringIO(), Clock()
    with track("training", 1000, "steps", console=Console(file=stream), clock=clock) as work:
        for step in range(1, 32):
            clock.now += 1
            work.advance(figures=partial("loss {}".format, step))
            clock.now += 2
            work.rest()
            work.beat()
    told = [line.partition(", loss ")[2].partition(",")[0] for line in stream.getvalue().splitlines()[1:-1]]
    assert told == ["11", "21", "31"]


def test_work_that_is_not_shown_has_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So if it fails, the outer work is as silent as before."""
    rests: list[Track] = []
    monkeypatch.setattr(Track, "rest", lambda work: rests.append(work))
    with track("outer", 3, console=Console(file=io.StringIO())):
        with pytest.raises(ValueError, match="inner"), track("hidden", 3, shown=False):
            raise ValueError("inner")
        assert rests == []
        with track("shown", 3, console=Console(file=io.StringIO())):
            pass
        assert len(rests) == 1


class Watched:
    """Work that counts the calls it gets."""

    def __init__(self) -> None:
        self.beats, self.rests, self.has_beaten = 0, 0, threading.Event()

    def beat(self) -> None:
        self.beats += 1
        self.has_beaten.set()

    def rest(self) -> None:
        self.rests += 1


def hearts() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "heartbeat"}


def test_a_thread_watches_the_innermost_work_and_ends_with_the_last() -> None:
    outer, inner, heartbeat, others = Watched(), Watched(), Heartbeat(period=0.001), hearts()
    heartbeat.watch(outer)
    assert outer.has_beaten.wait(60)
    (thread,) = hearts() - others
    heartbeat.watch(inner)
    assert inner.has_beaten.wait(60)
    until_then = outer.beats  # none is still running, because the thread has moved to the inner work
    inner.has_beaten.clear()
    assert inner.has_beaten.wait(60)
    assert (outer.beats, outer.rests) == (until_then, 0)
    outer.has_beaten.clear()
    heartbeat.close(inner)
    assert outer.rests == 1
    assert outer.has_beaten.wait(60)
    heartbeat.close(outer)
    thread.join(60)
    assert not thread.is_alive()
    heartbeat.watch(outer)  # and again
    outer.has_beaten.clear()
    assert outer.has_beaten.wait(60)
    heartbeat.close(outer)


def test_work_that_is_forgotten_is_not_watched() -> None:
    heartbeat, work, others = Heartbeat(period=0.001), Watched(), hearts()
    heartbeat.watch(work)
    assert work.has_beaten.wait(60)
    (thread,) = hearts() - others
    del work
    thread.join(60)
    assert not thread.is_alive()


def test_work_without_a_bar_is_watched_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any]] = []
    stand_in = SimpleNamespace(watch=lambda work: seen.append(("watch", work)), close=lambda work: None)
    monkeypatch.setattr(progress, "_HEARTBEAT", stand_in)
    with track("work", 4, console=Console(file=io.StringIO())) as work:
        assert seen == [("watch", work)]
    with track("bar", 4, console=Console(file=io.StringIO(), force_terminal=True)):
        assert len(seen) == 1


def test_what_goes_wrong_ends_without_a_line() -> None:
    stream, clock = io.StringIO(), Clock()
    work: dict[str, int] = {}
    with pytest.raises(KeyError), track("work", 4, console=Console(file=stream), clock=clock):
        work["missing"]
    assert stream.getvalue().splitlines() == ["work: 4"]


def test_a_line_is_not_broken_at_the_width_of_a_console() -> None:
    stream, clock = io.StringIO(), Clock()
    with track("w" * 300, 4, console=Console(file=stream, width=20), clock=clock):
        pass
    assert stream.getvalue() == "w" * 300 + ": 4\n"


def test_figures_are_fetched_only_when_they_are_shown() -> None:
    fetched: list[int] = []
    clock = Clock()

    def fetch(index: int) -> str:
        fetched.append(index)
        return ""

    with track("work", 100, console=Console(file=io.StringIO()), clock=clock) as work:
        for index in range(100):
            clock.now += 1
            work.advance(figures=partial(fetch, index))
    assert fetched == list(range(4, 99, 5))


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=200, color_system=None)
    with track("work", 4, "pieces", console=console, clock=clock) as work:
        clock.now += 30
        work.advance(figures=lambda: "loss [1.5]")
        clock.now += SECONDS_OF_BAR / 2
        work.advance(figures=lambda: "too soon to be drawn")
    shown = stream.getvalue()
    assert "━" in shown
    assert "\x1b[2K" in shown or "\x1b[1A" in shown or "\r" in shown  # drawn in place
    assert "work: " not in shown
    assert "2/4 pieces" in shown
    assert "too soon" not in shown


def test_work_within_work_shares_a_terminal_and_its_bar_goes() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=200, color_system=None)
    with track("outer", 2, console=console, clock=clock) as outer:
        outer.advance(2)
        with track("inner", 3, console=console, clock=clock) as inner:
            inner.advance(3)
        stream.seek(0)
        stream.truncate()
    assert "outer" in stream.getvalue()
    assert "inner" not in stream.getvalue()


def test_the_first_process_alone_shows_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with track("work", 4) as work:
        work.advance()
    say("something")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    with track("work", 4) as work:
        work.advance()
    say("something")
    assert capsys.readouterr() == ("", "work: 4\nsomething\n")


def test_what_is_not_to_be_shown_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with track("work", 4, shown=False) as work:
        work.advance()
    assert capsys.readouterr() == ("", "")


def test_a_file_gets_lines_though_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in CI
    with track("work", 4):
        pass
    assert capsys.readouterr().err == "work: 4\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7440, "2 h 04 min"),
        (86399, "1 d 00 h"),
        (273600, "3 d 04 h"),
    ],
)
def test_durations_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(12_300, "12 kB"), (3_400_000, "3.4 MB"), (1_234_000_000, "1.2 GB")],
)
def test_sizes_are_in_words(count: int, words: str) -> None:
    assert size(count) == words
