"""How near a translation is to its source, once it is translated back."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mlc.errors import UserError


def chrf(sources: Sequence[str], back: Sequence[str]) -> float:
    """chrF of messages that were translated back (Popović 2015, https://aclanthology.org/W15-3049), by sacrebleu.

    Args:
        sources: The messages of a prompt.
        back: The same, translated and translated back.

    Returns:
        From 0 to 100. The same text has 100.
    """
    from sacrebleu import sentence_chrf

    return round(float(sentence_chrf("\n".join(back), ["\n".join(sources)]).score), 1)


def require_sacrebleu() -> None:
    """Refuse ``--verify back`` without sacrebleu.

    Raises:
        UserError: It is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UserError(
            "verify", "needs sacrebleu; run `pip install 'lightning-mlc[translate]'`, or leave --verify out"
        ) from error
