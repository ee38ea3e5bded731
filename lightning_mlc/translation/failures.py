"""Why a text has no translation: the reasons, and the checks that find them."""

from __future__ import annotations

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.judges.base import unintelligible
from lightning_mlc.evaluation.judges.refusal import refuses
from lightning_mlc.lint import check_translation
from lightning_mlc.lint.checks import all_checks
from lightning_mlc.translation.texts import Reply, Text

REFUSED = "refused"
STRUCTURE = "not the JSON that was asked for"
"""The reply is not the JSON object with the code of the text and its translation."""
CUT = "cut off"
"""The longest translation was reached before the end."""
TOO_LONG = "too long for the model"
SOURCE_LANGUAGE = "in the source language"
DECLINED = "declined by the endpoint"
LENGTH = "length"
"""So long that it is more than a translation, or so short that something is missing."""

FEWEST, MOST = 0.15, 3.0
"""Characters of a translation per character of its source. The 972 translations of the sample have 0.17 to 1.63."""
SHORT, LONG = 20, 40
"""Characters by which a translation may fall short of the first limit (of its source) and exceed the second one,
because short texts vary more."""


def fault_of_reply(reply: str) -> str:
    """Why a reply without the form that was asked for is no translation."""
    return REFUSED if refuses(reply) is not None else STRUCTURE


def prepare_checks() -> None:
    """Load what the checks need, so that nothing is missing once there is a translation.

    Raises:
        UserError: A package is not installed, or cannot unpack its data.
    """
    checks = [check for check in all_checks().values() if check.option is None]
    if missing := sorted({name for check in checks for name in check.missing_packages()}):
        raise UserError(
            None,
            f"every translation is checked with {' and '.join(missing)}, which is not installed; "
            "run `pip install 'lightning-mlc[translate]'`",
        )
    check_translation("", "Loads the models of the checks.", "fr", "en")


def checked(text: Text, reply: Reply) -> Reply:
    """``reply``, or a failure if its translation is none."""
    if reply.translation is None:
        return reply
    failed = fault(text, reply.translation) or fault_found_by_lint(text, reply.translation)
    return reply if failed is None else Reply(None, failed)


def fault(text: Text, translation: str) -> str | None:
    """Why ``translation`` cannot be a translation of ``text``; None if nothing speaks against it."""
    if reason := unintelligible(translation):
        # Such as "2 + 2 = ?", which has no letters in any language.
        return None if reason == unintelligible(text.content) != "empty" else reason
    if refuses(translation) is not None and refuses(text.content) is None:
        return REFUSED
    length = len(text.content)
    if not FEWEST * (length - SHORT) <= len(translation) <= MOST * length + LONG:
        return LENGTH
    return None


def fault_found_by_lint(text: Text, translation: str) -> str | None:
    """Which error ``lightning-mlc lint`` finds in ``translation``; None if it finds none."""
    findings = check_translation(text.content, translation, text.source.code, text.target.code)
    if not findings:
        return None
    if any(finding.check == "language" and finding.note.endswith(f" {text.source.base}") for finding in findings):
        return SOURCE_LANGUAGE
    return f"lint: {findings[0].check}"
