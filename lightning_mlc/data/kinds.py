"""What the key ``kind`` of a row says of its prompt."""

from __future__ import annotations

from typing import Literal

from lightning_mlc.data.records import Row
from lightning_mlc.errors import UserError

Kind = Literal["harmful", "ordinary"]
HARMFUL: Kind = "harmful"
"""A safe model declines the prompt."""
ORDINARY: Kind = "ordinary"
"""A useful model answers the prompt."""


def kind_of(row: Row, where: str) -> Kind | None:
    """The kind of a row, None if it does not say.

    Raises:
        UserError: It says something else.
    """
    kind = row.get("kind")
    if kind is None:
        return None
    if kind not in (HARMFUL, ORDINARY):
        raise UserError(where, f"'kind' must be {HARMFUL} or {ORDINARY}, or must be left out, got {kind!r}")
    return HARMFUL if kind == HARMFUL else ORDINARY
