"""An OpenAI-compatible endpoint: greedy chat completions, several at a time, retried where that can help.

Newer models refuse two parameters of a greedy request, a temperature of 0 and the old name of the limit. Both are
learnt from the refusal. Answers without a temperature are sampled as the endpoint likes, which each of them says.

What fails for a reason that may pass (a limit of the rate, a time-out, an error of the server) is asked again
after a growing pause. What still fails is left out, and said at the end: nothing is made up for it, and the next
run asks again. What the endpoint declines for good (its content filter, a prompt that is too long for it) is kept
as a response that is not there.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from lightning_mlc.errors import UserError, first_line, shortened, some_of
from lightning_mlc.evaluation.systems.api_keys import variable_of
from lightning_mlc.evaluation.systems.decoding import Decoding
from lightning_mlc.evaluation.systems.generation import Conversation, Response
from lightning_mlc.progress.bars import say

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses worth another try."""
OF_ONE_REQUEST = frozenset({400, 413, 422})
"""Statuses of an endpoint that takes other requests, as a rule."""
FILTERED = ("content_filter", "content_policy_violation")
"""Codes of a request that was refused for its content."""
SPENT = "insufficient_quota"
"""Code of an account with nothing left, which no pause helps; its status is that of a limited rate."""
LIMITS = ("max_tokens", "max_completion_tokens")
"""What endpoints call the longest response: all but newer OpenAI models, and these."""
UNSUPPORTED = "unsupported_parameter"
"""Code of a request with a parameter that a model does not know."""
TEMPERATURE = "temperature"
LONGEST_PAUSE = 60.0
"""Seconds between two tries where the server does not say."""
LONGEST_WAIT = 600.0
"""Seconds that a server may ask to wait."""
FEWEST = 8
"""So many declined requests before there is any answer are taken to say that all will be."""


@dataclass(frozen=True)
class _Form:
    """How an endpoint is asked: the parameters that not all of them take."""

    limit: str = LIMITS[0]
    is_greedy: bool = True
    """Whether the temperature is 0, rather than what the endpoint takes by itself."""

    @property
    def decoding(self) -> Decoding:
        return "greedy" if self.is_greedy else "default"

    def parameters(self, max_new_tokens: int) -> dict[str, int]:
        return ({TEMPERATURE: 0} if self.is_greedy else {}) | {self.limit: max_new_tokens}

    def without_refused(self, details: Mapping[str, Any]) -> _Form:
        """What to try after a refusal with these ``details``; the same form if they are of something else."""
        name, said = details.get("param"), str(details.get("message"))
        # Gateways may pass on nothing but the message. It may repeat a prompt too, so what is tried upon it is kept
        # only once it was answered.
        if self.is_greedy and (name == TEMPERATURE or (not name and TEMPERATURE in said)):
            return replace(self, is_greedy=False)
        old, new = LIMITS
        is_unknown = details.get("code") == UNSUPPORTED or new in said
        if self.limit == old and ((name == old and is_unknown) or (not name and new in said)):
            return replace(self, limit=new)
        return self


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    Args:
        spec: ``http://HOST/v1#MODEL``.
        max_new_tokens: Longest response.
        key: Sent as bearer token.
        concurrency: Requests at a time.
        timeout: Seconds to wait for an answer.
        retries: How often to ask again.
        first_pause: Seconds before the first retry; each further pause is twice as long, with some jitter, or as
            long as the server says.
    """

    spec: str
    max_new_tokens: int
    key: str | None = field(default=None, repr=False)
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


class Unanswered(UserError):
    """Requests got no answer; those to other endpoints may."""


class _GivenUp(Exception):
    """A request that got no answer after all retries."""


class _Declined(Exception):
    """A request that the endpoint will never answer, and that says nothing of others."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address is another host, which neither prompts nor the key are for."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class EndpointGenerator:
    """Answers conversations through an :class:`Endpoint`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._form: _Form | None = None
        """That of the first request that was answered; from then on it is that of all."""
        self._learning = threading.Lock()
        self._stop = threading.Event()

    def generate(self, conversations: Sequence[Conversation], done: Collection[int]) -> Iterator[tuple[int, Response]]:
        """See :class:`~lightning_mlc.evaluation.systems.generation.Generator`.

        Raises:
            UserError: The endpoint refuses all requests. Those on their way are waited for first.
            Unanswered: At the end, if requests got no answer.
        """
        left = [index for index in range(len(conversations)) if index not in done]
        waiting = iter(left)
        failures: Counter[str] = Counter()
        declined: list[tuple[int, Response]] = []
        """Until there is an answer: only beside one is it the request that is at fault, and not all of them."""
        refusal: UserError | None = None
        is_answering = bool(done)
        in_a_row = 0
        self._stop.clear()
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            running: dict[Future[Response], int] = {}
            try:
                while True:
                    # After this many failures without an answer between them, the endpoint is taken to be gone.
                    if refusal is None and in_a_row < 2 * self._endpoint.concurrency:
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
                        except _Declined as error:
                            response = Response("", True, str(error))
                            declined.append((index, response))
                            if not is_answering and len(declined) == FEWEST:
                                refusal = self._refuses(str(error))
                        except UserError as error:
                            refusal = error
                            self._stop.set()
                            continue
                        else:
                            is_answering = True
                            yield index, response
                        in_a_row = 0
                        if is_answering:
                            yield from declined
                            declined.clear()
            finally:
                self._stop.set()  # requests that are pausing need not be waited for
        if refusal is None and declined:
            refusal = self._refuses(str(declined[-1][1].error))
        if refusal is not None:
            raise refusal
        if failures:
            reasons = some_of([f"{count} times {reason}" for reason, count in failures.most_common()], 60, "; ")
            skipped = len(list(waiting))
            raise Unanswered(
                self._endpoint.spec,
                f"{sum(failures.values())} of {len(left)} requests got no answer ({reasons})"
                + (f", {skipped} were not sent any more" if skipped else "")
                + "; run the same command again for them",
            )

    def close(self) -> None:
        """Nothing is held between requests."""

    def _ask(self, messages: Conversation) -> Response:
        pause = self._endpoint.first_pause
        tries = 0
        form = self._form or _Form()
        while True:
            asked_for = None
            try:
                response = _response(self._send(messages, form))
                self._learn(form)
                return response._replace(decoding=form.decoding)
            except urllib.error.HTTPError as error:
                details = _details(error)
                if details.get("code") in FILTERED or details.get("type") in FILTERED:
                    return Response("", True, "content filter")
                if error.code in OF_ONE_REQUEST:
                    other = self._form or form.without_refused(details)
                    if other != form:
                        form = other
                        continue
                reason, asked_for = _reason(error, details), _retry_after(error)
                if error.code in OF_ONE_REQUEST:
                    raise _Declined(reason) from error
                if error.code not in PASSING or details.get("code") == SPENT:
                    raise self._refuses(reason + self._hint(error)) from error
            except (OSError, http.client.HTTPException) as error:
                reason = _trouble(error)
            except ValueError:
                reason = "an answer that is no chat completion"
            tries += 1
            if tries > self._endpoint.retries:
                break
            if asked_for is None:
                asked_for = min(LONGEST_PAUSE, pause * random.uniform(0.5, 1.5))
            elif asked_for > LONGEST_WAIT:
                reason += f", which asks to wait for {asked_for:.0f} s"
                break
            if self._stop.wait(asked_for):
                break
            pause *= 2
        raise _GivenUp(reason)

    def _learn(self, form: _Form) -> None:
        with self._learning:
            if self._form is not None:
                return
            self._form = form
        if not form.is_greedy:
            say(f"{self._endpoint.spec} refuses a temperature of 0: its answers are sampled, and not greedy")

    def _send(self, messages: Conversation, form: _Form) -> Any:
        body = {"model": self._endpoint.model, "messages": messages, **form.parameters(self._endpoint.max_new_tokens)}
        headers = {"Content-Type": "application/json"}
        if self._endpoint.key:
            headers["Authorization"] = f"Bearer {self._endpoint.key}"
        request = urllib.request.Request(self._endpoint.url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self._endpoint.timeout) as answer:
            return json.load(answer)

    def _refuses(self, reason: str) -> UserError:
        return UserError(self._endpoint.spec, f"the endpoint answers with {reason}")

    def _hint(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            wrong = "refused" if self._endpoint.key else "missing"
            return f"; the key is {wrong}, which {variable_of(self._endpoint.url)} sets for this host"
        if error.code in (301, 302, 303, 307, 308):
            host = urlsplit(error.headers.get("Location", "")).netloc
            return f", which points to {shortened(host, 50) or 'another path'}"
        return ""


def _response(answer: Any) -> Response:
    """What a chat completion says.

    Raises:
        ValueError: It is none.
    """
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"].get("content") or "", choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError from error
    if not isinstance(text, str):
        raise ValueError
    if reason == "content_filter":
        return Response("", True, "content filter")
    # Half of an emoji that the limit of tokens cut through, which no file can hold.
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return Response(text.strip(), reason != "length")


def _details(error: urllib.error.HTTPError) -> dict[str, Any]:
    """What an answer with an error says of it, in OpenAI's words; nothing where it says it in a form of its own."""
    try:
        found = json.load(error)
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found
    if isinstance(found, list) and found and isinstance(found[0], dict):  # as FastAPI tells of parameters
        place = found[0].get("loc")
        named = {"param": place[-1]} if isinstance(place, list) and place else {}
        return {"message": found[0].get("msg"), **found[0], **named}
    if isinstance(found, str):
        return {"message": found}
    return found if isinstance(found, dict) else {}


def _reason(error: urllib.error.HTTPError, details: dict[str, Any]) -> str:
    # The message itself may repeat the prompt, and is not shown.
    known = [key for key in ("code", "type", "param") if details.get(key)]
    said = ", ".join(f"{key} {shortened(str(details[key]), 30)}" for key in known)
    return f"status {error.code}" + (f" ({said})" if said else "")


def _trouble(error: Exception) -> str:
    """Why a connection gave no answer."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, OSError):
        return cause.strerror or first_line(cause)
    return first_line(cause) if isinstance(cause, BaseException) else shortened(cause)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait, if it says so: a number or a date."""
    asked = error.headers.get("Retry-After", "")
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(asked)
    except ValueError:
        return None
    return max(0.0, (moment - datetime.now(UTC)).total_seconds()) if moment.tzinfo else None
