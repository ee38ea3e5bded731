"""The pages of the documentation that are written from the code."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("option_tables", DOCS / "_site" / "option_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "options.md"])
def test_pages_are_those_of_the_code(name: str, tables: ModuleType) -> None:
    """If this fails, run ``python docs/_site/option_tables.py``."""
    assert (DOCS / name).read_text(encoding="utf-8") == tables.PAGES[name]() + "\n"


def test_an_option_without_a_description_is_an_error(tables: ModuleType) -> None:
    class Settings:
        """Settings.

        Args:
            told: Has a description.
        """

        def __init__(self, told: int = 1, silent: str | None = None) -> None: ...

    with pytest.raises(ValueError, match="Settings does not describe its option silent"):
        tables.options_of(Settings)
    parser = argparse.ArgumentParser(prog="lightning-mlc thing")
    parser.add_argument("--silent")
    with pytest.raises(ValueError, match="lightning-mlc thing does not describe its option --silent"):
        list(tables.options_of_parser(parser))


def test_rows_of_a_table(tables: ModuleType) -> None:
    class Settings:
        """Settings.

        Args:
            path: A file
                | or a ``folder``, as in :class:`~pathlib.Path`.
            share: A share.
            names: Names.
        """

        def __init__(self, path: str, share: float = 0.5, names: tuple[str, ...] = ()) -> None: ...

    assert tables.section("Title", "Text.", tables.options_of(Settings), 3) == [
        "### Title",
        "Text.",
        "| key | default | |\n|---|---|---|\n"
        "| `path` | *required* | A file \\| or a `folder`, as in `Path`. |\n"
        "| `share` | `0.5` | A share. |\n"
        "| `names` |  | Names. |",
    ]
