"""What came of a translation: failures by language and by kind of prompt. No text of the data is shown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rich.console import Console
from rich.table import Table

KIND_TITLES = {"harmful": "harmful", "ordinary": "ordinary", "": "rows without kind"}
WORRYING = 0.05
"""How much larger the share of failures among harmful prompts is, if a warning is due."""


@dataclass
class Outcome:
    """What came of the prompts of one kind in one language."""

    asked: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Number of prompts without a translation, by reason."""
    scores: list[float] = field(default_factory=list)
    """chrF of the translations that were translated back."""
    unverified: int = 0
    """Number of translations that could not be translated back."""

    @property
    def failed(self) -> int:
        """Number of prompts without a translation."""
        return self.failures.total()

    @property
    def share(self) -> float:
        """Share of prompts without a translation."""
        return self.failed / self.asked if self.asked else 0.0


class Report:
    """Counts by language and kind."""

    def __init__(self, languages: Sequence[str]) -> None:
        self.languages = languages
        self.outcomes: dict[tuple[str, str], Outcome] = defaultdict(Outcome)
        self.kept: Counter[str] = Counter()
        """Number of prompts by language that the data had in it already, and that stay."""

    def add(self, language: str, kind: str, failed: str | None, score: float | None, verified: bool) -> None:
        """Count one prompt in one language.

        Args:
            language: Code of the language.
            kind: Kind of the row.
            failed: Why there is no translation; None if there is one.
            score: chrF of the translation; None if there is none.
            verified: Whether translations are translated back.
        """
        outcome = self.outcomes[language, kind]
        outcome.asked += 1
        if failed is not None:
            outcome.failures[failed] += 1
        elif score is not None:
            outcome.scores.append(score)
        elif verified:
            outcome.unverified += 1

    def of(self, language: str) -> list[Outcome]:
        """The outcomes of ``language``, of all kinds."""
        return [outcome for (own, _), outcome in self.outcomes.items() if own == language]

    def reasons(self, language: str) -> Counter[str]:
        """Number of prompts that ``language`` lacks, by reason."""
        return sum((outcome.failures for outcome in self.of(language)), Counter())

    @property
    def without_any(self) -> list[str]:
        """Languages that the file has no prompt in, because every translation failed."""
        return [
            language
            for language in self.languages
            if not self.kept[language]
            and (outcomes := self.of(language))
            and all(outcome.failed == outcome.asked for outcome in outcomes)
        ]

    @property
    def last_line(self) -> str | None:
        """What the user must not overlook: languages without any prompt, or failures. None: there are no failures."""
        remedy = "translate them with another model (--only_missing)"
        if self.without_any:
            told = [f"{code} (most often: {self.reasons(code).most_common(1)[0][0]})" for code in self.without_any]
            return f"error: no prompt was translated into {', '.join(told)}; {remedy}"
        failed = {code: count for code in self.languages if (count := self.reasons(code).total())}
        if not failed:
            return None
        asked = sum(outcome.asked for outcome in self.outcomes.values())
        told = [f"{code} {count}" for code, count in failed.items()]
        return (
            f"warning: {sum(failed.values())} of {asked} translations failed and are null: {', '.join(told)}; {remedy}"
        )

    @property
    def kinds(self) -> list[str]:
        """Kinds that there are."""
        return [kind for kind in KIND_TITLES if any(own == kind for _, own in self.outcomes)]

    def warnings(self) -> list[str]:
        """Languages without any translation, and those in which more is lost of the harmful prompts than of others."""
        found = []
        for language in self.languages:
            if language in self.without_any:
                found.append(
                    f"{language}: no prompt was translated, so training has no prompts in this language; "
                    "translate with another model (--only_missing)"
                )
                continue
            harmful = self.outcomes.get((language, "harmful"), Outcome())
            ordinary = self.outcomes.get((language, "ordinary"), Outcome())
            if ordinary.asked and harmful.share > ordinary.share + WORRYING:
                found.append(
                    f"{language}: {harmful.share:.0%} of the harmful prompts failed and {ordinary.share:.0%} of the "
                    "ordinary ones, so training on this file would teach less about harmful prompts in this "
                    "language; translate those with another model (--only_missing)"
                )
        return found

    def print(self, console: Console, title: str) -> None:
        """Print a table, the reasons, and warnings."""
        console.print(title, soft_wrap=True, highlight=False)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("language", "translated", *(f"failed, {KIND_TITLES[kind]}" for kind in self.kinds)):
            table.add_column(column, justify="left" if column == "language" else "right")
        scored = any(outcome.scores or outcome.unverified for outcome in self.outcomes.values())
        if scored:
            for kind in self.kinds:
                table.add_column(f"chrF, {KIND_TITLES[kind]}", justify="right")
        for language in self.languages:
            parts = [self.outcomes.get((language, kind), Outcome()) for kind in self.kinds]
            asked, failed = sum(part.asked for part in parts), sum(part.failed for part in parts)
            cells = [f"{asked - failed} of {asked}", *(f"{part.failed} of {part.asked}" for part in parts)]
            if scored:
                cells += [f"{fmean(part.scores):.1f}" if part.scores else "-" for part in parts]
            table.add_row(language, *cells)
        console.print(table)
        for language in self.languages:
            if reasons := self.reasons(language):
                told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
                console.print(f"{language}, reasons: {told}", soft_wrap=True, highlight=False)
            if unverified := sum(part.unverified for part in self.of(language)):
                console.print(f"{language}: {unverified} could not be translated back", highlight=False)
        for warning in self.warnings():
            console.print(f"warning: {warning}", soft_wrap=True, highlight=False)
