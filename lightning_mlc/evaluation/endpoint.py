"""An OpenAI-compatible endpoint: greedy chat completions, several at a time, retried where that can help.

What fails for a reason that may pass (a limit of the rate, a time-out, an error of the server) is asked again
after a growing pause. What still fails is left out, and said at the end: nothing is made up for it, and the next
run asks again. What the endpoint declines for good (its content filter) is kept as a response that is not there.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.generation import Conversation, Response

API_KEY = "OPENAI_API_KEY"
"""Environment variable with the key, sent where it is set."""
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses worth another try."""
FILTERED = ("content_filter", "content_policy_violation")
"""Codes of a request that was refused for its content."""
LONGEST_PAUSE = 60.0
"""Seconds."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Args:
        spec: ``http://HOST/v1#MODEL``.
        max_new_tokens: Longest response.
        concurrency: Requests at a time.
        timeout: Seconds to wait for an answer.
        retries: How often to ask again.
        first_pause: Seconds before the first retry; each further pause is twice as long, with some jitter, or as
            long as the server says.
    """

    spec: str
    max_new_tokens: int
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    first_pause: float = 1.0

    @property
    def url(self) -> str:
        return self.spec.partition("#")[0].rstrip("/") + "/chat/completions"

    @property
    def model(self) -> str:
        return self.spec.partition("#")[2]


class _GivenUp(Exception):
    """A request that got no answer after all retries."""


class EndpointGenerator:
    """Answers conversations through an :class:`Endpoint`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._limit = "max_tokens"
        """What the endpoint calls the longest response; newer OpenAI models know only ``max_completion_tokens``."""
        self._stop = threading.Event()

    def generate(self, conversations: Sequence[Conversation], done: Collection[int]) -> Iterator[tuple[int, Response]]:
        """See :class:`~lightning_mlc.evaluation.generation.Generator`.

        Raises:
            UserError: At the end, if requests got no answer; at once, if the endpoint refuses all of them.
        """
        left = [index for index in range(len(conversations)) if index not in done]
        waiting = iter(left)
        failures: Counter[str] = Counter()
        in_a_row = 0
        self._stop.clear()
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            running: dict[Future[Response], int] = {}
            try:
                while True:
                    # After this many failures without an answer between them, the endpoint is taken to be gone.
                    if in_a_row < 2 * self._endpoint.concurrency:
                        for index in waiting:
                            running[pool.submit(self._ask, conversations[index])] = index
                            if len(running) == self._endpoint.concurrency:
                                break
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        index = running.pop(future)
                        try:
                            response = future.result()
                        except _GivenUp as error:
                            failures[str(error)] += 1
                            in_a_row += 1
                            continue
                        in_a_row = 0
                        yield index, response
            finally:
                self._stop.set()  # requests that are pausing need not be waited for
        if failures:
            reasons = "; ".join(f"{count} times {reason}" for reason, count in failures.most_common())
            skipped = len(list(waiting))
            raise UserError(
                f"{self._endpoint.spec}: {sum(failures.values())} of {len(left)} requests got no answer ({reasons})"
                + (f", {skipped} were not sent any more" if skipped else "")
                + "; the answers that came are kept, so run the same command again"
            )

    def _ask(self, messages: Conversation) -> Response:
        pause = self._endpoint.first_pause
        for attempt in range(self._endpoint.retries + 1):
            try:
                return _response(self._send(messages))
            except urllib.error.HTTPError as error:
                found = self._explain(error)
                if isinstance(found, Response):
                    return found
                reason, asked_for = found
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                timed_out = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
                reason = "no answer in time" if timed_out else type(error).__name__
                asked_for = None
            if attempt == self._endpoint.retries:
                break
            seconds = min(LONGEST_PAUSE, asked_for if asked_for is not None else pause * random.uniform(0.5, 1.5))
            if self._stop.wait(seconds):
                break
            pause *= 2
        raise _GivenUp(reason)

    def _send(self, messages: Conversation) -> Any:
        body = {
            "model": self._endpoint.model,
            "messages": messages,
            "temperature": 0,
            self._limit: self._endpoint.max_new_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._endpoint.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self._endpoint.timeout) as answer:
            return json.load(answer)

    def _explain(self, error: urllib.error.HTTPError) -> Response | tuple[str, float | None]:
        """A response that will not be there, or why to ask again and after how many seconds.

        Raises:
            UserError: The endpoint will refuse every request.
        """
        details = _details(error)
        if details.get("code") in FILTERED or details.get("type") in FILTERED:
            return Response("", True, "content filter")
        if error.code == 400 and details.get("param") == "max_tokens":
            self._limit = "max_completion_tokens"
            return "unsupported max_tokens", 0.0
        if error.code in PASSING:
            return f"status {error.code}", _retry_after(error)
        # The message itself may repeat the prompt, and is not shown.
        said = ", ".join(f"{key} {details[key]}" for key in ("code", "type", "param") if details.get(key))
        hint = f"; is {API_KEY} set?" if error.code in (401, 403) else ""
        raise UserError(
            f"{self._endpoint.spec}: the endpoint answers with status {error.code}"
            + (f" ({said})" if said else "")
            + hint
        )


def _response(answer: Any) -> Response:
    choice = answer["choices"][0]
    text, reason = choice["message"].get("content") or "", choice.get("finish_reason")
    if not isinstance(text, str):
        raise TypeError("content is not text")
    if reason == "content_filter":
        return Response("", True, "content filter")
    return Response(text.strip(), reason != "length")


def _details(error: urllib.error.HTTPError) -> dict[str, Any]:
    try:
        body = json.load(error)
        found = body.get("error", body)
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:  # none, or a date
        return None
