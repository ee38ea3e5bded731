"""The command ``lint``, as users run it."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_model

from lightning_mlc.cli import main
from lightning_mlc.lint.checks.language import _identifier, _known_families

SOURCE = "How do I keep my bicycle from rusting in winter?"
GOOD = {"prompt": {"en": SOURCE, "ru": "Как зимой уберечь велосипед от ржавчины?"}, "response": "r"}
WARNED = {"prompt": {"en": f"{SOURCE} (250)", "ru": "Как зимой уберечь велосипед от ржавчины?"}, "response": "r"}
BAD = {"id": "bad one", "prompt": {"en": SOURCE, "ru": SOURCE}, "response": "r"}


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(("row", "status"), [(GOOD, 0), (WARNED, 0), (BAD, 1)])
def test_the_status_is_1_for_errors_only(tmp_path: Path, row: object, status: int) -> None:
    assert main(["lint", write(tmp_path / "a.jsonl", row)]) == status


def test_counts_come_before_places_and_no_text_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, BAD)
    assert main(["lint", path, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("2 rows, 4 texts, 2 languages, 22 checks; errors: 3, warnings: 0\n")
    assert out.index("errors") < out.index(f"{path} row 2 (bad one) ru: copy (a copy)") < out.index("wrote")
    written = (tmp_path / "a.json").read_text() + (tmp_path / "a.html").read_text()
    assert not any(word in part for word in ("bicycle", "велосипед") for part in (out, err, written))


def test_a_file_in_one_language_is_told_from_a_file_without_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"prompt": {"en": SOURCE, "ru": None}, "response": "r"}
    assert main(["lint", write(tmp_path / "a.jsonl", one)]) == 0
    assert "only 'en' is there, so no translation was checked; `lightning-mlc translate`" in capsys.readouterr().out
    assert main(["lint", write(tmp_path / "b.jsonl", GOOD)]) == 0
    assert "no translation was checked" not in capsys.readouterr().out


def test_several_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{name}.jsonl", GOOD) for name in ("train", "val")]
    assert main(["lint", *files]) == 0
    assert f"{files[1]} row 1 ru: overlap (also in train.jsonl)" in capsys.readouterr().out


def test_another_source_language(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    assert main(["lint", path, "--source_language", "ru"]) == 0


def test_tokens_are_counted_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": {"en": "Where is it?", "bn": "এটা কোথায় আছে বলো?"}, "response": "r"}
    assert main(["lint", write(tmp_path / "a.jsonl", row), "--model", str(save_model(tmp_path / "model"))]) == 0
    assert "  bn: tokens (4." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gone.jsonl"], "FILE: there is no file gone.jsonl; give a file"),
        (["a.jsonl", "--source_language", "xx1"], "--source_language: 'xx1' is not a language code"),
        (["a.jsonl", "--source_language", "sw"], "a.jsonl row 1: has no prompt in the source language 'sw'"),
        (["a.jsonl", "--only", "cpoy"], "--only: there is no check 'cpoy'; did you mean copy?"),
        (["a.jsonl", "--skip", "cpoy"], "--skip: there is no check 'cpoy'"),
        (["a.jsonl", "--fix"], "--fix: needs --out FILE"),
        (["a.jsonl", "--out", "b.jsonl"], "--out: needs --fix"),
        (["a.jsonl", "--fix", "--out", "b.csv"], "--out: must be a .jsonl file, got b.csv"),
        (["a.jsonl", "--fix", "--out", "a.jsonl"], "--out: a.jsonl exists; give another name"),
        (["a.jsonl", "a.jsonl", "--fix", "--out", "b.jsonl"], "--fix: takes one FILE, got 2"),
        (["a.jsonl", "--json", "a.jsonl"], "--json: a.jsonl is already read or written by this command"),
        (["a.jsonl", "--json", "b", "--html", "b"], "--html: b is already read or written by this command"),
        (["a.jsonl", "--html", "no/b.html"], "--html: there is no folder no; make it first"),
        (["a.jsonl", "--json", "."], "--json: . is a folder; give a file"),
        (["a.jsonl", "--rows", "-1"], "--rows: must be 0 or more, got -1"),
        (["a.jsonl", "--gguf_file", "x"], "--gguf_file: needs --model"),
        (["a.jsonl", "--model", "./gone"], "--model: there is no folder ./gone"),
        (["empty.jsonl"], "empty.jsonl is empty"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "empty.jsonl").touch()
    assert main(["lint", *options]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith(("reading ", "checking "))]
    assert line.startswith("error: ")
    assert message in line
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "empty.jsonl"]


def test_it_starts_without_torch() -> None:
    code = (
        "import sys; from lightning_mlc.cli import main; main(['lint', 'sample'])\n"
        "print([name for name in ('torch', 'lightning', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit of a process on the size of files stands in for the disk."""
    path = write(tmp_path / "a.jsonl", *[{**BAD, "id": f"{'i' * 4000}{n}", "response": "r"} for n in range(200)], GOOD)
    fix = ["lint", path, "--skip", "language", "--fix", "--out", str(tmp_path / "b.jsonl")]
    documents = ["lint", path, "--skip", "language", "--json", str(tmp_path / "b.json")]
    full = ["lint", path]  # the data of a check is unpacked into the temporary folder
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _identifier.cache_clear()
    _known_families.cache_clear()
    for said, args in (("--out: cannot write", fix), ("--json: cannot write", documents), ("cannot unpack", full)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
        try:
            status = main(args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert status == 2
        assert f"error: {said} " in (told := capsys.readouterr().err)
        assert "(File too large); " in told
        assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]
    signal.signal(signal.SIGXFSZ, handler)


def test_json_may_go_to_standard_output(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    code = f"from lightning_mlc.cli import main; main(['lint', {path!r}, '--json', '/dev/stdout'])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])["rows"] == 1
    assert Path("/dev/stdout").is_symlink()
