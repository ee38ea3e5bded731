"""Failures by language and by kind."""

from __future__ import annotations

import io

from rich.console import Console

from lightning_mlc.translation.report import Report


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=100)
    report.print(console, "translations")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def filled(failing: dict[tuple[str, str], int], each: int = 10) -> Report:
    report = Report(["sw", "ur"])
    for language in report.languages:
        for kind in ("harmful", "ordinary"):
            for number in range(each):
                failed = "refused" if number < failing.get((language, kind), 0) else None
                report.add(language, kind, failed, None, False)
    return report


def test_failures_are_counted_by_language_and_kind() -> None:
    told = printed(filled({("sw", "harmful"): 4, ("ur", "ordinary"): 1}))
    rows = [line.split() for line in told.splitlines() if line.startswith(("sw ", "ur "))]
    assert rows == [
        ["sw", "16", "of", "20", "4", "of", "10", "0", "of", "10"],
        ["ur", "19", "of", "20", "0", "of", "10", "1", "of", "10"],
    ]
    assert "sw, reasons: refused 4" in told
    assert "rows without kind" not in told


def test_a_loss_of_harmful_prompts_is_a_warning_and_one_of_both_kinds_is_none() -> None:
    assert filled({("sw", "harmful"): 4, ("sw", "ordinary"): 4}).warnings() == []
    assert filled({("sw", "ordinary"): 4}).warnings() == []
    (warning,) = filled({("sw", "harmful"): 4, ("ur", "harmful"): 0}).warnings()
    assert warning.startswith("sw: 40% of the harmful prompts failed and 0% of the ordinary ones")
    assert "warning: sw: 40%" in printed(filled({("sw", "harmful"): 4}))


def test_the_last_line_is_about_what_was_lost() -> None:
    assert filled({}).last_line is None
    report = filled({("sw", "harmful"): 4, ("ur", "ordinary"): 1})
    assert report.last_line is not None
    assert report.last_line.startswith("warning: 5 of 40 translations failed and are null: sw 4, ur 1;")
    report = filled({("sw", "harmful"): 10, ("sw", "ordinary"): 10})
    assert report.without_any == ["sw"]
    assert report.last_line is not None
    assert report.last_line.startswith("error: no prompt was translated into sw (most often: refused);")
    report.kept["sw"] = 1  # the data had one
    assert report.without_any == []
    assert report.last_line.startswith("warning: 20 of 40 translations failed")


def test_a_language_without_any_translation_is_a_warning() -> None:
    nothing = filled({("sw", "harmful"): 10, ("sw", "ordinary"): 10, ("ur", "ordinary"): 9})
    assert nothing.warnings() == [
        "sw: no prompt was translated, so training has no prompts in this language; translate with another model "
        "(--only_missing)"
    ]
    assert Report(["sw"]).warnings() == []


def test_scores_are_means_of_what_was_translated_back() -> None:
    report = Report(["sw"])
    for failed, score in ((None, 40.0), (None, 60.0), (None, None), ("refused", None)):
        report.add("sw", "", failed, score, True)
    told = printed(report)
    assert "50.0" in told
    assert "rows without kind" in told
    assert "sw: 1 could not be translated back" in told
