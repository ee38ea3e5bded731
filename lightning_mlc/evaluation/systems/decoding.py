"""How the tokens of responses are chosen, and how results say so.

All of an evaluation is meant to be greedy. Some endpoints refuse that, and sampled answers must not pass for greedy
ones: records of such answers say ``"decoding": "default"``, and so do results and the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

Decoding = Literal["greedy", "default"]
"""The likeliest token each, or as an endpoint likes that takes no temperature of 0."""


def noted(decoding: Decoding) -> dict[str, str]:
    """What a record, or a judge's description, says of ``decoding``: nothing where it is greedy."""
    return {} if decoding == "greedy" else {"decoding": decoding}


def decoding_of(records: Iterable[Mapping[str, Any]]) -> Decoding:
    """That of all ``records``: greedy if each of them is."""
    return "default" if any("decoding" in record for record in records) else "greedy"
