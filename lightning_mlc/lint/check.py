"""The interface of a check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from lightning_mlc.errors import UserError
from lightning_mlc.lint.findings import Finding, Severity
from lightning_mlc.lint.rows import LintRow, Pair
from lightning_mlc.lint.texts import Text

if TYPE_CHECKING:
    from lightning_mlc.sources import ModelSource


class BackTranslator(Protocol):
    """Translates texts back into the language of their sources."""

    def back(self, texts: Sequence[Text], language: str) -> list[str | None]:
        """Each of ``texts`` in ``language``, a BCP-47 code; None where the translation failed.

        Raises:
            UserError: The model cannot be run, or does not know a language.
        """


@dataclass(frozen=True)
class LintSettings:
    """Settings that checks use in addition to the data."""

    source_language: str = "en"
    files: Sequence[str] = field(default=())
    """Paths of all files, as the user gave them."""
    model: ModelSource | None = None
    """The model whose tokenizer counts tokens. Option ``--model``."""
    embeddings: ModelSource | None = None
    """The model of sentence embeddings. Option ``--embeddings``."""
    quality: ModelSource | None = None
    """The model of quality estimation. Option ``--quality``."""
    translator: BackTranslator | None = None
    """Translates back. Option ``--translator``."""
    device: str = "auto"
    """Where local models run. Option ``--device``."""

    def gives(self, option: str) -> bool:
        """Whether an option of a check, such as ``--model``, is set."""
        return getattr(self, option.removeprefix("--")) is not None


class Check(ABC):
    """One way in which translations can be wrong. Data is read twice: all rows to learn, then all rows to check."""

    name: ClassVar[str]
    """The name that ``--only`` and ``--skip`` take."""
    severity: ClassVar[Severity]
    title: ClassVar[str]
    """A few words for its findings."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that it imports and that not every installation has."""
    option: ClassVar[str | None] = None
    """The option that turns it on. None: it is always on."""

    @classmethod
    def made(cls, settings: LintSettings) -> Self:
        """Make the check for one run."""
        return cls()

    @classmethod
    def learns(cls) -> bool:
        """Whether it looks at all rows before it checks any."""
        return cls.learn is not Check.learn

    @classmethod
    def missing_packages(cls) -> list[str]:
        """Modules of :attr:`packages` that are not installed."""
        return [name for name in cls.packages if find_spec(name) is None]

    @classmethod
    def require_packages(cls) -> None:
        """Require :attr:`packages`.

        Raises:
            UserError: One is not installed.
        """
        if missing := cls.missing_packages():
            raise UserError(
                None,
                f"the check '{cls.name}' needs {' and '.join(missing)}: run `pip install {' '.join(missing)}`, "
                f"or leave the check out with --skip {cls.name}",
            )

    def learn(self, file: int, row: LintRow) -> None:  # noqa: B027  # most checks have nothing to learn
        """Take a row into the statistics.

        Args:
            file: Index of its file.
            row: The row.
        """

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        """Find errors in a row."""
        return iter(())

    def columns(self) -> Iterator[Finding]:
        """Find errors of whole columns. Called once, after all rows."""
        return iter(())

    def found(self, pair: Pair, note: str) -> Finding:
        """A finding of this check in the text of ``pair``."""
        return Finding(self.name, self.severity, pair.text.language, note, pair.part)

    def found_in_column(self, language: str, note: str) -> Finding:
        """A finding of this check in the column of ``language``."""
        return Finding(self.name, self.severity, language, note)


class TextCheck(Check):
    """A check of one text, which is compared with its source."""

    of_source: ClassVar[bool] = False
    """Whether the source text is checked as well, with itself as its source."""

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        for pair in row.pairs:
            if (self.of_source or not pair.is_source) and (note := self.fault(pair)) is not None:
                yield self.found(pair, note)

    @abstractmethod
    def fault(self, pair: Pair) -> str | None:
        """Say in a few words what is wrong with a text, without words of the text. None: nothing is wrong."""
