"""An OpenAI-compatible endpoint: greedy chat completions, several at a time, with retries.

A failure that may be temporary (a rate limit, a time-out, a server error) is retried after a growing pause. If all
retries fail, the prompt gets no response, the run reports this at its end, and the next run asks again. If the endpoint
rejects a prompt for good (its content filter, a prompt that is too long), the record has the reason in its ``error``.

Newer models reject two parameters of a greedy request: a temperature of 0, and the old name of the limit. Then the
request is sent again without the one that the error names. Answers without a temperature are sampled, and each record
says so.
"""

from __future__ import annotations

import json
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from lightning_mlc.errors import UserError, first_line, shortened, some_of
from lightning_mlc.evaluation.systems.api_keys import variable_of
from lightning_mlc.evaluation.systems.chat_completion import (
    LATE,
    OF_ONE_REQUEST,
    Refused,
    RequestForm,
    connection_trouble,
    read_completion,
)
from lightning_mlc.evaluation.systems.generation import Conversation, Response
from lightning_mlc.evaluation.systems.proxies import proxy_of
from lightning_mlc.progress.bars import say

LONGEST_BACKOFF = 60.0
"""Seconds between two tries, unless the server asks for another pause."""
LONGEST_RETRY_AFTER = 600.0
"""Longest pause in seconds that a server may ask for."""
REJECTIONS_BEFORE_STOPPING = 8
"""If that many first requests are all rejected, the endpoint is taken to reject every request."""


@dataclass(frozen=True)
class Endpoint:
    """Where an endpoint is, and how to ask it.

    Args:
        spec: ``http://HOST/v1#MODEL``.
        max_new_tokens: Longest response, in tokens.
        key: Sent as a bearer token; None sends none.
        concurrency: Number of requests at a time.
        timeout: Seconds to wait for an answer, from the request to its last byte.
        retries: How often to ask again.
        first_pause: Seconds before the first retry. Each further pause is twice as long, with jitter, unless the server
            asks for another pause.
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

    def rejects(self, reason: str) -> UserError:
        """The error if this endpoint rejects every request."""
        return UserError(self.spec, f"the endpoint answers with {reason}")

    def client(self) -> httpx.Client:
        """A pool of connections. It follows no redirect, because prompts and keys are meant for this host alone.

        Proxies come from the environment (``HTTPS_PROXY``, ``NO_PROXY``), and certificates from the system. An address
        of this machine is asked without a proxy, because prompts for it are not to leave the machine.

        Raises:
            UserError: The environment names a proxy that cannot be used.
        """
        try:
            return httpx.Client(
                timeout=httpx.Timeout(self.timeout, pool=None),
                limits=httpx.Limits(max_connections=self.concurrency),
                verify=ssl.create_default_context(),
                follow_redirects=False,
                trust_env=False,
                proxy=proxy_of(self.url),
            )
        except (ImportError, ValueError) as error:
            raise UserError(self.spec, f"cannot use the proxy of the environment ({first_line(error)})") from error


class Unanswered(UserError):
    """Some requests got no answer. Requests to other endpoints may still be answered."""


class _GivenUp(Exception):
    """A request got no answer after all retries."""


class _Rejected(Exception):
    """The endpoint will never answer this request. Other requests are not affected."""


class _Progress:
    """The outcome of the requests so far.

    Args:
        endpoint: The endpoint that is asked.
        is_answering: Whether it has answered any request before.
        stop: Set to end the pauses before retries.
    """

    def __init__(self, endpoint: Endpoint, is_answering: bool, stop: threading.Event) -> None:
        self._endpoint = endpoint
        self._is_answering = is_answering
        self._stop = stop
        self._failures: Counter[str] = Counter()
        self._failures_in_a_row = 0
        self._rejected: list[tuple[int, Response]] = []
        """Held back until there is an answer: without one, the fault may be in every request."""
        self._refusal: UserError | None = None

    @property
    def may_continue(self) -> bool:
        """Whether to send more requests: not after a refusal, nor after many failures without an answer."""
        return self._refusal is None and self._failures_in_a_row < 2 * self._endpoint.concurrency

    def settle(self, index: int, request: Future[Response]) -> list[tuple[int, Response]]:
        """Take note of one finished request, and return the responses that are certain now."""
        ready: list[tuple[int, Response]] = []
        try:
            ready.append((index, request.result()))
            self._is_answering = True
        except _GivenUp as error:
            self._failures[str(error)] += 1
            self._failures_in_a_row += 1
            return ready
        except _Rejected as error:
            self._rejected.append((index, Response("", True, str(error))))
            if not self._is_answering and len(self._rejected) == REJECTIONS_BEFORE_STOPPING:
                self._refusal = self._endpoint.rejects(str(error))
        except UserError as error:
            self._refusal = error
            self._stop.set()
            return ready
        self._failures_in_a_row = 0
        if self._is_answering:
            ready += self._rejected
            self._rejected.clear()
        return ready

    def finish(self, asked: int, skipped: int) -> None:
        """Report what went wrong.

        Args:
            asked: Number of requests that were needed.
            skipped: Number of those that were not sent.

        Raises:
            UserError: The endpoint rejects every request.
            Unanswered: Some requests got no answer.
        """
        if self._refusal is None and self._rejected:
            self._refusal = self._endpoint.rejects(str(self._rejected[-1][1].error))
        if self._refusal is not None:
            raise self._refusal
        if self._failures:
            counted = [f"{count} times {reason}" for reason, count in self._failures.most_common()]
            raise Unanswered(
                self._endpoint.spec,
                f"{sum(self._failures.values())} of {asked} requests got no answer ({some_of(counted, 60, '; ')})"
                + (f", {skipped} were not sent" if skipped else "")
                + ("; if the server is slow, raise timeout or lower concurrency" if LATE in self._failures else "")
                + "; run the same command again to ask for them",
            )


class EndpointGenerator:
    """Answers conversations through an :class:`Endpoint`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._client = endpoint.client()
        self._form: RequestForm | None = None
        """The form of the first request that was answered; all later requests use it."""
        self._learning = threading.Lock()
        self._stop = threading.Event()

    def generate(self, conversations: Sequence[Conversation], done: Collection[int]) -> Iterator[tuple[int, Response]]:
        """See :class:`~lightning_mlc.evaluation.systems.generation.Generator`.

        Raises:
            UserError: The endpoint rejects every request. Requests that were already sent are completed first.
            Unanswered: At the end, if some requests got no answer.
        """
        left = [index for index in range(len(conversations)) if index not in done]
        waiting = iter(left)
        self._stop.clear()
        progress = _Progress(self._endpoint, bool(done), self._stop)
        running: dict[Future[Response], int] = {}
        try:
            while True:
                while progress.may_continue and len(running) < self._endpoint.concurrency:
                    index = next(waiting, None)
                    if index is None:
                        break
                    running[self._begin(conversations[index])] = index
                if not running:
                    break
                for request in wait(running, return_when=FIRST_COMPLETED).done:
                    yield from progress.settle(running.pop(request), request)
        finally:
            self._stop.set()  # ends the pauses before retries
        progress.finish(len(left), len(list(waiting)))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _begin(self, messages: Conversation) -> Future[Response]:
        """Ask in a thread of its own. A user who stops the command need not wait for it, as for threads of a pool."""
        request: Future[Response] = Future()

        def run() -> None:
            try:
                request.set_result(self._ask(messages))
            except BaseException as error:
                request.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return request

    def _ask(self, messages: Conversation) -> Response:
        """The response to one conversation, after as many retries as it takes.

        Raises:
            _GivenUp: All retries failed.
            _Rejected: The endpoint rejects this conversation.
            UserError: The endpoint rejects every request.
        """
        pause = self._endpoint.first_pause
        tries = 0
        form = self._form or RequestForm()
        while True:
            wait_for = None
            try:
                response = self._send(messages, form)
                self._learn(form)
                return response._replace(decoding=form.decoding)
            except Refused as refusal:
                if refusal.is_filtered:
                    return Response("", True, "content filter")
                if refusal.status in OF_ONE_REQUEST:
                    other = self._form or form.without_refused(refusal.details)
                    if other == form:
                        raise _Rejected(refusal.reason) from refusal
                    form = other
                    continue
                if not refusal.is_temporary:
                    raise self._endpoint.rejects(refusal.reason + self._hint(refusal)) from refusal
                reason, wait_for = refusal.reason, refusal.retry_after
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                reason = connection_trouble(error)
            except ValueError:
                reason = "an answer that is not a chat completion"
            tries += 1
            if tries > self._endpoint.retries:
                break
            if wait_for is None:
                wait_for = min(LONGEST_BACKOFF, pause * random.uniform(0.5, 1.5))
            elif wait_for > LONGEST_RETRY_AFTER:
                reason += f", which asks for a pause of {wait_for:.0f} s"
                break
            if self._stop.wait(wait_for):
                break
            pause *= 2
        raise _GivenUp(reason)

    def _learn(self, form: RequestForm) -> None:
        with self._learning:
            if self._form is not None:
                return
            self._form = form
        if not form.is_greedy:
            say(f"{self._endpoint.spec} refuses a temperature of 0: its answers are sampled, not greedy")

    def _send(self, messages: Conversation, form: RequestForm) -> Response:
        body = {"model": self._endpoint.model, "messages": messages, **form.parameters(self._endpoint.max_new_tokens)}
        headers = {"Content-Type": "application/json"}
        if self._endpoint.key:
            headers["Authorization"] = f"Bearer {self._endpoint.key}"
        # Streamed, because the status counts even if the connection breaks before the end of the body.
        content = json.dumps(body).encode()
        end = time.monotonic() + self._endpoint.timeout
        with self._client.stream("POST", self._endpoint.url, content=content, headers=headers) as answer:
            return read_completion(answer, end)

    def _hint(self, refusal: Refused) -> str:
        if refusal.status in (401, 403):
            wrong = "refused" if self._endpoint.key else "missing"
            return f"; the key is {wrong} (set {variable_of(self._endpoint.url)} for this host)"
        if refusal.status in (301, 302, 303, 307, 308):
            host = urlsplit(refusal.headers.get("location", "")).netloc
            return f", which points to {shortened(host, 50) or 'another path'}"
        return ""
