"""A report as what it says, and two ways to write it: HTML in one file, and Markdown beside its pictures."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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
    """Cells of text; the first column is the heading of its row.

    ``strong`` are the indices of rows to set off, ``rule_before`` those that start a new part, ``words`` those of
    columns that hold words and not numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: Sequence[int] = ()
    rule_before: Sequence[int] = ()
    words: Sequence[int] = (0,)


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows, for those who do not see it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Verbatim:
    """Text as it is, whatever it contains."""

    text: str
    language: str = "und"


Block = Heading | Paragraph | Table | Picture | Verbatim

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif; color: #1a1a1a; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #bbb; padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { max-width: 46rem; }
.tables { display: flex; flex-wrap: wrap; gap: .4rem 3rem; align-items: flex-start; }
.tables > div { overflow-x: auto; max-width: 100%; margin: .6rem 0; }
.caption { font-weight: 600; max-width: 24rem; margin: 0 0 .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .8rem .22rem 0; text-align: right; white-space: nowrap; vertical-align: baseline; }
th.words, td.words { text-align: left; }
thead th { border-bottom: 1.5px solid #333; vertical-align: bottom; font-weight: 600; }
tbody th { font-weight: 400; }
tbody tr.strong th, tbody tr.strong td { font-weight: 600; }
tbody tr.rule th, tbody tr.rule td { border-top: 1px solid #999; }
td small { color: #555; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #444; font-size: .9rem; max-width: 46rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .6rem .8rem; }
code { font-size: .92em; }
@page { margin: 1.5cm; }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 8.5pt; line-height: 1.35; }
  h2 { margin-top: 1.4rem; }
  .tables { gap: .2rem 1.8rem; }
  th, td { padding: .08rem .5rem .08rem 0; }
  figure img { max-height: 10.5cm; width: auto; }
  h2, h3, .caption { break-after: avoid; }
  figure, tr, .tables > div { break-inside: avoid; }
  .tables > div { overflow: visible; }
}
"""


def to_html(blocks: Sequence[Block]) -> str:
    """One file that needs no other, and runs no script."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    parts: list[str] = []
    for is_table, group in itertools.groupby(blocks, lambda block: isinstance(block, Table)):
        inside = "\n".join(_html(block) for block in group)
        # Tables that follow one another stand beside each other where there is room.
        parts.append(f'<div class="tables">\n{inside}\n</div>' if is_table else inside)
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Verbatim):
        return f'<pre lang="{html.escape(block.language)}" dir="auto">{html.escape(block.text)}</pre>'
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode()
        caption = html.escape(block.caption)
        width = _png_width(block.path) * 2 // 3  # as large on all screens as letters of its size should be
        image = f'<img src="data:image/png;base64,{data}" width="{width}" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    kinds = [' class="words"' if index in block.words else "" for index in range(len(block.columns))]
    head = "".join(
        f'<th scope="col"{kind}>{_inline(cell)}</th>' for cell, kind in zip(block.columns, kinds, strict=True)
    )
    rows = []
    for index, row in enumerate(block.rows):
        marks = " ".join(
            name for name, marked in (("strong", block.strong), ("rule", block.rule_before)) if index in marked
        )
        cells = f'<th scope="row"{kinds[0]}>{_inline(row[0])}</th>'
        cells += "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        rows.append(f'<tr class="{marks}">{cells}</tr>' if marks else f"<tr>{cells}</tr>")
    caption = f'<p class="caption">{_inline(block.caption)}</p>' if block.caption else ""
    body = "\n".join(rows)
    return f"<div>{caption}<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    """An interval in brackets stands back behind its figure."""
    return re.sub(r"(\[[^\]]*\])", r"<small>\1</small>", _inline(text))


def _inline(text: str) -> str:
    """Escaped, with `code` as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """Text with its pictures as links relative to ``folder``."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_harmless(block.text)}"
    if isinstance(block, Paragraph):
        return _harmless(block.text)
    if isinstance(block, Verbatim):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return f"{fence}text\n{block.text}\n{fence}"
    if isinstance(block, Picture):
        return f"![{_harmless(block.caption)}]({block.path.relative_to(folder).as_posix()})"
    lines = [
        _row(block.columns),
        _row([":--" if index in block.words else "--:" for index in range(len(block.columns))]),
    ]
    for index, row in enumerate(block.rows):
        lines.append(_row([f"**{cell}**" if cell and index in block.strong else cell for cell in row]))
    return (f"{_harmless(block.caption)}\n\n" if block.caption else "") + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_harmless(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _harmless(text: str) -> str:
    """No HTML, which Markdown would pass on; `code` shows it as it is."""
    parts = re.split(r"((?<![`\\])`(?!`)[^`]+`(?!`))", text)
    return "".join(part if index % 2 else html.escape(part, quote=False) for index, part in enumerate(parts))


def _png_width(path: Path) -> int:
    """Pixels, from the header."""
    return int.from_bytes(path.read_bytes()[16:20], "big")
