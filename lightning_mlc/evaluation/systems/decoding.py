"""How the tokens of responses are chosen, and how results record it.

An evaluation decodes greedily. Some endpoints refuse this, and their answers are sampled. The records of such answers
say ``"decoding": "default"``, and so do the results and the report, so that they do not pass for greedy ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

Decoding = Literal["greedy", "default"]
"""``greedy`` takes the most likely token. ``default`` is an endpoint's own way if it refuses a temperature of 0."""


def decoding_entry(decoding: Decoding) -> dict[str, str]:
    """The entry for ``decoding`` in a record or a description of a judge; empty for greedy decoding."""
    return {} if decoding == "greedy" else {"decoding": decoding}


def decoding_of(records: Iterable[Mapping[str, Any]]) -> Decoding:
    """The decoding of all ``records`` together, which is greedy if that of each record is."""
    return "default" if any("decoding" in record for record in records) else "greedy"
