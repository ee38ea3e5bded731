"""Build the documentation site: ``python docs/_site/build.py OUT``.

The pages of ``docs/`` are copied to a folder of their own. Links that leave ``docs/``
lead to the repository if it has an address (``--repository``), and are plain text if not. Then Sphinx builds the site;
every warning is an error: a broken link or anchor, a page outside the menu, a docstring that cannot be read.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).parent
DOCS = HERE.parent
ROOT = DOCS.parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Pages of the repository's root, by their names on the site. `index.md` stands for the README."""


def main() -> int:
    """Build the site, and return the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the site")
    parser.add_argument("--repository", help="address of the repository, such as https://github.com/OWNER/NAME")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write_pages(source, options.repository)
        return int(sphinx(["-W", "--keep-going", "-q", "-j", "auto", "-b", "html", str(source), str(options.out)]))


def write_pages(source: Path, repository: str | None) -> None:
    """Write everything that Sphinx reads to the folder ``source``."""
    shutil.copy(HERE / "conf.py", source)
    shutil.copytree(HERE / "static", source / "static")
    shutil.copytree(DOCS / "images", source / "images")
    pages = {path.name: (path, path.read_text(encoding="utf-8")) for path in DOCS.glob("*.md")}
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        pages[ROOT_PAGES[name]] = (ROOT / name, (ROOT / name).read_text(encoding="utf-8"))
    for name, (path, text) in pages.items():
        (source / name).write_text(for_site(text, path, source, repository), encoding="utf-8")


def for_site(text: str, page: Path, source: Path, repository: str | None) -> str:
    """Change the links of a page.

    Args:
        text: Its Markdown.
        page: Its file.
        source: The folder of the site's sources, to which pictures from other folders are copied.
        repository: Address of the repository.
    """

    def changed(found: re.Match[str]) -> str:
        target, anchor, words = found["target"], found["anchor"] or "", found["text"]
        if "://" in target:
            return found[0]
        path = (page.parent / target).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page} links to {target}, which does not exist")
        name = path.relative_to(ROOT).as_posix()
        if found["image"]:
            copy = source / "images" / path.name
            if not copy.exists():
                shutil.copy(path, copy)
            return f"![{words}](images/{path.name})"
        if path.parent == DOCS and path.suffix == ".md":
            return f"[{words}]({path.name}{anchor})"
        if name in ROOT_PAGES:
            return f"[{words}]({ROOT_PAGES[name]}{'' if name == 'README.md' else anchor})"
        if repository is not None:
            return f"[{words}]({repository.rstrip('/')}/{'tree' if path.is_dir() else 'blob'}/main/{name})"
        return words

    return LINK.sub(changed, text)


if __name__ == "__main__":
    sys.exit(main())
