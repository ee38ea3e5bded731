"""Find wrong translations, without showing any text."""

from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.translation import check_translation

__all__ = ["Finding", "check_translation"]
