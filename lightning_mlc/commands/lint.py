"""``lightning-mlc lint``: check the translations of data files, and say what is wrong without showing any text."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mlc.commands.options import OneLineParser
from lightning_mlc.commands.stopping import stoppable
from lightning_mlc.errors import UserError, renamed
from lightning_mlc.files.paths import expand_all

if TYPE_CHECKING:
    from lightning_mlc.lint.linting import Report

STATUS_OF_ERRORS = 1


def parser() -> OneLineParser:
    """The options of ``lint``."""
    found = OneLineParser(
        prog="lightning-mlc lint",
        description="check the translations of data files; no text is ever shown",
        epilog="The exit status is 1 if there are errors, else 0. docs/data.md explains the checks.",
    )
    found.add_argument("files", nargs="+", metavar="FILE", help="data in any layout that training reads, or 'sample'")
    found.add_argument("--source_language", default="en", metavar="CODE", help="language of the responses (en)")
    found.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="run these checks alone")
    found.add_argument("--skip", nargs="+", default=[], metavar="CHECK", help="leave these checks out")
    found.add_argument("--model", help="count tokens with this model's tokenizer: a folder or an id of the hub")
    found.add_argument("--gguf_file", metavar="NAME", help="name of a GGUF file in --model")
    found.add_argument("--embeddings", metavar="MODEL", help="compare meanings with a model of sentence embeddings")
    found.add_argument("--quality", metavar="MODEL", help="score translations with a model of quality estimation")
    found.add_argument("--translator", metavar="MODEL", help="translate back and compare: a --model of translate")
    found.add_argument("--allow_remote", nargs="+", default=[], metavar="HOST", help="where --translator may be")
    found.add_argument("--device", default="auto", help="where these three run: auto, cpu, cuda:1")
    found.add_argument("--rows", type=int, default=20, metavar="N", help="list N findings in rows; 0 lists all (20)")
    found.add_argument("--json", metavar="FILE", help="write all counts and findings")
    found.add_argument("--html", metavar="FILE", help="write a page with a heat map of checks by language")
    found.add_argument("--fix", action="store_true", help="write a copy in which translations with an error are null")
    found.add_argument("--out", metavar="FILE", help="the copy that --fix writes, a .jsonl file that does not exist")
    return found


def run(args: Sequence[str]) -> int:
    """Check files, print a report, and write the files that the options name.

    Args:
        args: Arguments after ``lightning-mlc lint``.

    Returns:
        The exit status: 1 if there are errors, else 0.

    Raises:
        UserError: An option or a file is wrong.
        Interrupted: The user stopped the command.
    """
    options = parser().parse_args(args)
    expand_all(options)
    with stoppable("stopped; nothing was written"):
        return _checked(options)


def _checked(options: argparse.Namespace) -> int:
    from rich.console import Console

    from lightning_mlc.data.languages import canonical_language
    from lightning_mlc.data.reading import locate
    from lightning_mlc.lint.check import LintSettings
    from lightning_mlc.lint.fixing import fixed_copy
    from lightning_mlc.lint.linting import choose_checks, lint
    from lightning_mlc.lint.tables import show

    source_language = canonical_language(options.source_language, "--source_language")
    inputs = [locate(file, "FILE") for file in options.files]
    _require_writable(options, [path for path in inputs if path is not None])
    fixed = None
    with ExitStack() as stack:
        settings = LintSettings(source_language, tuple(options.files), **_models(options, stack), device=options.device)
        checks = choose_checks(settings, options.only, options.skip)
        if options.fix:
            fixer = fixed = stack.enter_context(fixed_copy(Path(options.out), source_language))
            report = lint(options.files, source_language, checks, lambda _, row, found: fixer.write(row, found))
        else:
            report = lint(options.files, source_language, checks)
    show(report, Console(), options.rows)
    written = _write(options, report)
    if fixed is not None:
        written.append(f"{options.out}: {fixed.nulls} translations are null, {fixed.left_out} rows are left out")
    if written:
        print("wrote", *written, sep="\n  ")
    return STATUS_OF_ERRORS if report.total("error") else 0


def _models(options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """The models of the settings that were asked for. ``stack`` releases them."""
    found: dict[str, Any] = {}
    if options.model is not None:
        from lightning_mlc.sources import ModelSource

        found["model"] = ModelSource(options.model, options.gguf_file)
    for name in ("embeddings", "quality"):
        if (model := getattr(options, name)) is not None:
            from lightning_mlc.sources import ModelSource

            # It warns of weights that the checks do not need. Others that are missing are an error.
            # A level instead of a filter would turn on a warning that only distributed models need.
            logging.getLogger("transformers.modeling_utils").addFilter(_is_error)
            with renamed(("model.name_or_path",), f"--{name}"):
                found[name] = ModelSource.parse(model)
    if options.translator is not None:
        from lightning_mlc.progress.bars import say
        from lightning_mlc.translation.back import BackTranslation

        with renamed(("model",), "--translator"), renamed(("device",), "--device"):
            found["translator"] = BackTranslation(options.translator, options.allow_remote, options.device)
        stack.callback(found["translator"].close)
        say(f"texts to be translated back: {found['translator'].destination}")
    return found


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _write(options: argparse.Namespace, report: Report) -> list[str]:
    """Write the documents that were asked for, and return their paths.

    Raises:
        UserError: One cannot be written.
    """
    from lightning_mlc.files.atomic import write_whole
    from lightning_mlc.lint.documents import to_html, to_json
    from lightning_mlc.lint.fixing import cannot_write

    written = []
    for option, path, make in (("--json", options.json, to_json), ("--html", options.html, to_html)):
        if path is not None:
            target = Path(path)
            if target.is_file():  # and not the link itself, such as /dev/stdout
                target = target.resolve()
            try:
                write_whole(target, make(report))
            except OSError as error:
                raise cannot_write(option, path, error) from error
            written.append(path)
    return written


def _require_writable(options: argparse.Namespace, inputs: Sequence[Path]) -> None:
    """Refuse, before any work, files that could not be written at the end.

    Raises:
        UserError: ``--fix`` and ``--out`` do not come together, a path is of an input, or its folder does not exist.
    """
    if options.gguf_file is not None and options.model is None:
        raise UserError("--gguf_file", "needs --model; give the folder or repository of the file")
    if options.allow_remote and options.translator is None:
        raise UserError("--allow_remote", "needs --translator; no other option sends texts anywhere")
    if options.device != "auto" and (options.embeddings, options.quality, options.translator) == (None, None, None):
        raise UserError("--device", "needs --embeddings, --quality or --translator; nothing else runs a model")
    if options.rows < 0:
        raise UserError("--rows", f"must be 0 or more, got {options.rows}")
    if options.fix != (options.out is not None):
        given, other = ("--fix", "--out FILE") if options.fix else ("--out", "--fix")
        raise UserError(given, f"needs {other}; give both, or neither")
    if options.fix and len(options.files) > 1:
        raise UserError("--fix", f"takes one FILE, got {len(options.files)}; fix them one by one")
    if options.out is not None and Path(options.out).suffix.lower() != ".jsonl":
        raise UserError("--out", f"must be a .jsonl file, got {options.out}; training reads any layout from one")
    if options.out is not None and Path(options.out).exists():
        raise UserError("--out", f"{options.out} exists; give another name")
    taken = {path.resolve() for path in inputs}
    for name in ("json", "html", "out"):
        if (path := getattr(options, name)) is None:
            continue
        if Path(path).resolve() in taken:
            raise UserError(f"--{name}", f"{path} is already read or written by this command; give another name")
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{name}", f"there is no folder {Path(path).parent}; make it first")
        if Path(path).is_dir():
            raise UserError(f"--{name}", f"{path} is a folder; give a file")
        taken.add(Path(path).resolve())
