"""The chat completion protocol: parameters of a request, and what answers and errors mean."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from lightning_mlc.errors import first_line, shortened
from lightning_mlc.evaluation.systems.decoding import Decoding
from lightning_mlc.evaluation.systems.generation import Response

TEMPORARY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which a retry can succeed."""
OF_ONE_REQUEST = frozenset({400, 413, 422})
"""Statuses that reject one request. The endpoint usually accepts others."""
FILTERED = ("content_filter", "content_policy_violation")
"""Codes of a request that was rejected because of its content."""
QUOTA_SPENT = "insufficient_quota"
"""Code of an account without credit. Its status is that of a rate limit, but waiting does not help."""
LIMIT_NAMES = ("max_tokens", "max_completion_tokens")
"""Names of the longest response: the common one, and the one that newer OpenAI models require."""
UNSUPPORTED = "unsupported_parameter"
"""Code of a request with a parameter that the model does not know."""
TEMPERATURE = "temperature"
LATE = "no answer in time"
LARGEST_ANSWER = 1 << 24
"""Bytes of an answer. A completion of 10,000 tokens has less than a hundredth of that."""


@dataclass(frozen=True)
class RequestForm:
    """The request parameters that some endpoints reject.

    Args:
        limit: Name of the parameter for the longest response, one of ``LIMIT_NAMES``.
        is_greedy: Whether to send a temperature of 0; else the endpoint's default applies.
    """

    limit: str = LIMIT_NAMES[0]
    is_greedy: bool = True

    @property
    def decoding(self) -> Decoding:
        return "greedy" if self.is_greedy else "default"

    def parameters(self, max_new_tokens: int) -> dict[str, int]:
        return ({TEMPERATURE: 0} if self.is_greedy else {}) | {self.limit: max_new_tokens}

    def without_refused(self, details: Mapping[str, Any]) -> RequestForm:
        """The form to try after a refusal with these ``details``; this same form if they are about something else."""
        name, message = details.get("param"), str(details.get("message"))
        # Some gateways pass on only the message. Because a message can also repeat a prompt, the caller keeps the new
        # form only after it was answered.
        if self.is_greedy and (name == TEMPERATURE or (not name and TEMPERATURE in message)):
            return replace(self, is_greedy=False)
        old, new = LIMIT_NAMES
        is_unknown = details.get("code") == UNSUPPORTED or new in message
        if self.limit == old and ((name == old and is_unknown) or (not name and new in message)):
            return replace(self, limit=new)
        return self


class Refused(Exception):
    """An answer with an error status.

    Args:
        status: HTTP status.
        headers: Of the answer.
        details: What its body says, see :func:`error_details`.
    """

    def __init__(self, status: int, headers: Mapping[str, str], details: Mapping[str, Any]) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.details = details

    @property
    def is_filtered(self) -> bool:
        """Whether a content filter refused the request."""
        return self.details.get("code") in FILTERED or self.details.get("type") in FILTERED

    @property
    def is_temporary(self) -> bool:
        """Whether a retry can succeed."""
        return self.status in TEMPORARY and self.details.get("code") != QUOTA_SPENT

    @property
    def reason(self) -> str:
        """Status and codes. The message is left out because it can repeat the prompt."""
        known = [key for key in ("code", "type", "param") if self.details.get(key)]
        codes = ", ".join(f"{key} {shortened(str(self.details[key]), 30)}" for key in known)
        return f"status {self.status}" + (f" ({codes})" if codes else "")

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait, given as a number or as a date; None if it does not ask."""
        asked = self.headers.get("retry-after", "")
        try:
            return max(0.0, float(asked))
        except ValueError:
            pass
        try:
            moment = parsedate_to_datetime(asked)
        except ValueError:
            return None
        return max(0.0, (moment - datetime.now(UTC)).total_seconds()) if moment.tzinfo else None


def read_completion(answer: httpx.Response, end: float = math.inf) -> Response:
    """The response in a chat completion.

    Args:
        answer: The answer, whose body was not read yet.
        end: The time of the clock ``time.monotonic`` at which the whole body must be there.

    Raises:
        Refused: The answer has an error status.
        ValueError: The answer is not a chat completion.
        httpx.HTTPError: The connection broke, or took too long.
    """
    if not answer.is_success:
        raise Refused(answer.status_code, answer.headers, error_details(answer, end))
    try:
        choice = json.loads(_body(answer, end))["choices"][0]
        text, reason = choice["message"].get("content") or "", choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError from error
    if not isinstance(text, str):
        raise ValueError
    if reason == "content_filter":
        return Response("", True, "content filter")
    # The limit of tokens can cut an emoji into two surrogates, and a file cannot contain an unpaired one.
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return Response(text.strip(), reason != "length")


def _body(answer: httpx.Response, end: float) -> bytes:
    """The body. It is read in pieces, because the time-outs of a connection are those of a piece, not of the whole."""
    found = bytearray()
    for piece in answer.iter_bytes():
        found += piece
        if len(found) > LARGEST_ANSWER:
            raise ValueError("too large")
        if time.monotonic() > end:
            raise httpx.ReadTimeout("the answer does not end")
    return bytes(found)


def error_details(answer: httpx.Response, end: float) -> dict[str, Any]:
    """The ``code``, ``type``, ``param`` and ``message`` of an error, as far as its body has them.

    OpenAI's form and FastAPI's form are understood. Other forms give an empty dictionary.
    """
    try:
        found = json.loads(_body(answer, end))
    except (httpx.HTTPError, ValueError, RecursionError):
        return {}
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found
    if isinstance(found, list) and found and isinstance(found[0], dict):  # FastAPI's form
        place = found[0].get("loc")
        named = {"param": place[-1]} if isinstance(place, list) and place else {}
        return {"message": found[0].get("msg"), **found[0], **named}
    if isinstance(found, str):
        return {"message": found}
    return found if isinstance(found, dict) else {}


def connection_trouble(error: Exception) -> str:
    """Why a connection gave no answer, in a few words."""
    if isinstance(error, httpx.TimeoutException):
        return LATE
    cause: BaseException | None = error
    while cause is not None:  # httpx wraps the error of the operating system
        if isinstance(cause, OSError):
            return cause.strerror or first_line(cause)
        cause = cause.__cause__ or cause.__context__
    return first_line(error)
