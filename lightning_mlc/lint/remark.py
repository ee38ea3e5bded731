"""What training says of translations: one line, if some are surely wrong."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

from lightning_mlc.data.languages import canonical_language
from lightning_mlc.data.loading import named
from lightning_mlc.data.records import Place
from lightning_mlc.data.spool import Spool, example_of
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.checks import all_checks
from lightning_mlc.lint.rows import LintRow, lint_row

ALL = 50
"""Number of rows that are looked at in any data."""
SHARE = 100
"""In addition, one row in this many. To check a row takes half as long as to prepare it."""

logger = logging.getLogger("lightning_mlc")


def remark(source_language: str, paths: Sequence[str], spool: Spool) -> None:
    """Warn of wrong translations among examples that were prepared for training.

    Only the checks that find errors and need no package of the extra ``lint`` are run, and on large data only on some
    rows.

    Args:
        source_language: Code of the language of the responses.
        paths: The data, as the user gave it.
        spool: The examples.
    """
    source = canonical_language(source_language, "data.source_language")
    rows = list(_sampled(spool, source))
    settings = LintSettings(source, tuple(paths))
    cheap = [kind for kind in all_checks().values() if kind.severity == "error" and not kind.packages]
    checks = [kind.made(settings) for kind in cheap if kind.option is None]
    for check in checks:
        for row in rows:
            check.learn(0, row)
    wrong, counts = 0, Counter[str]()
    for row in rows:
        found = [finding for check in checks for finding in check.check(0, row)]
        wrong += len({(finding.language, finding.part) for finding in found})
        counts.update(finding.check for finding in found)
    if wrong:
        logger.warning(
            "%d texts in %d of %d rows of %s are surely wrong translations (%s): see `lightning-mlc lint %s%s`",
            wrong,
            len(rows),
            spool.rows,
            named(paths),
            ", ".join(f"{name} {count}" for name, count in counts.most_common()),
            shlex.join(paths),
            "" if source == "en" else f" --source_language {source}",
        )


def _sampled(spool: Spool, source_language: str) -> Iterator[LintRow]:
    """Rows at equal distances."""
    wanted = min(spool.rows, ALL + spool.rows // SHARE)
    number = 0
    for part in spool.read():
        for written in part:
            number += 1
            if number * wanted // spool.rows > (number - 1) * wanted // spool.rows:
                example = example_of(written)
                responses = dict(example.translated)
                if example.chosen is not None and example.rejected is not None:
                    responses[source_language] = example.chosen, example.rejected
                where = Place(example.where, number)
                yield lint_row(where, example.id, example.prompts, source_language, responses)
