"""The parts of a report, and two ways to write it: HTML in one file, and Markdown with links to its pictures."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2


@dataclass(frozen=True)
class Heading:
    """Starts a section; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of text. The first cell of a row is its heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: Sequence[int] = ()
    """Indices of bold rows."""
    rule_before: Sequence[int] = ()
    """Indices of rows that have a rule above them."""
    words: Sequence[int] = (0,)
    """Indices of columns that hold words, which are aligned to the left. The others hold numbers."""


@dataclass(frozen=True)
class Picture:
    """A PNG file, and a caption that describes it, also to readers who cannot see it."""

    path: Path
    caption: str

    @property
    def data_url(self) -> str:
        """A ``data:`` URL with the content of the file."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()

    @property
    def display_width(self) -> int:
        """Width on a page, in CSS pixels. An inch of the picture has 150 pixels and is shown with 100."""
        pixels = int.from_bytes(self.path.read_bytes()[16:20], "big")  # of the PNG header
        return pixels * 2 // 3


@dataclass(frozen=True)
class Verbatim:
    """Text that is shown unchanged, whatever it contains."""

    text: str
    language: str = "und"


Block = Heading | Paragraph | Table | Picture | Verbatim

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def to_html(blocks: Sequence[Block]) -> str:
    """One HTML file, which contains its pictures and its style. It loads nothing and runs no script."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    # Tables that follow each other are one group, which the page puts side by side.
    groups = [list(group) for _, group in itertools.groupby(blocks, lambda block: isinstance(block, Table))]
    return _TEMPLATES.get_template("report.html.jinja").render(title=title, groups=groups)


def _kind(block: Block) -> str:
    return type(block).__name__


def _code_spans(text: str) -> list[tuple[bool, str]]:
    """``text`` in pieces, each with whether it is `code`, without its backticks."""
    return [(index % 2 == 1, piece) for index, piece in enumerate(re.split(r"`([^`]+)`", text))]


def _interval_spans(text: str) -> list[tuple[bool, str]]:
    """``text`` in pieces, each with whether it is an interval in brackets."""
    return [(index % 2 == 1, piece) for index, piece in enumerate(re.split(r"(\[[^\]]*\])", text))]


_TEMPLATES.filters |= {"kind": _kind, "code_spans": _code_spans, "interval_spans": _interval_spans}


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """Markdown. Pictures are links relative to ``folder``."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_without_html(block.text)}"
    if isinstance(block, Paragraph):
        return _without_html(block.text)
    if isinstance(block, Verbatim):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return f"{fence}text\n{block.text}\n{fence}"
    if isinstance(block, Picture):
        return f"![{_without_html(block.caption)}]({block.path.relative_to(folder).as_posix()})"
    lines = [
        _markdown_row(block.columns),
        _markdown_row([":--" if index in block.words else "--:" for index in range(len(block.columns))]),
    ]
    for index, row in enumerate(block.rows):
        lines.append(_markdown_row([f"**{cell}**" if cell and index in block.strong else cell for cell in row]))
    return (f"{_without_html(block.caption)}\n\n" if block.caption else "") + "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_without_html(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _without_html(text: str) -> str:
    """``text`` with HTML escaped, because Markdown passes HTML on. Inside `code` Markdown escapes it itself."""
    parts = re.split(r"((?<![`\\])`(?!`)[^`]+`(?!`))", text)
    return "".join(part if index % 2 else html.escape(part, quote=False) for index, part in enumerate(parts))
