"""The endpoint client against a server that limits the rate, is slow, breaks, and declines."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_endpoint import Answer, completion, failure, serve

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems import endpoint
from lightning_mlc.evaluation.systems.endpoint import REJECTIONS_BEFORE_STOPPING, Endpoint, EndpointGenerator
from lightning_mlc.evaluation.systems.generation import Response


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def ask(url: str, texts: list[str], done: set[int] | None = None, **options: Any) -> Iterator[tuple[int, Response]]:
    settings = {"concurrency": 3, "timeout": 5.0, "retries": 3, "first_pause": 0.01} | options
    generator = EndpointGenerator(Endpoint(f"{url}#the/model", 48, **settings))
    return generator.generate([[{"role": "user", "content": text}] for text in texts], done or set())


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each pause between two attempts. The test does not wait for them."""
    asked_for: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            asked_for.append(timeout)
            return self.is_set()

    monkeypatch.setattr(
        endpoint, "threading", SimpleNamespace(Event=Stop, Lock=threading.Lock, Thread=threading.Thread)
    )
    return asked_for


def echo(text: str, before: int) -> Answer:
    return completion(f" to {text}\n", "length" if text == "long" else "stop")


def test_a_request_is_greedy_and_limited_and_its_answer_is_read() -> None:
    with serve(echo) as served:
        found = dict(ask(served.url, ["a", "long"]))
    assert found == {0: Response("to a", True), 1: Response("to long", False)}
    body = next(body for body in served.bodies if body["messages"][0]["content"] == "a")
    assert body == {
        "path": "/v1/chat/completions",
        "model": "the/model",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0,
        "max_tokens": 48,
    }
    assert "Authorization" not in served.headers[0]


def test_the_key_is_sent_and_not_shown() -> None:
    with serve(echo) as served:
        list(ask(served.url, ["a"], key="k-secret"))
    assert served.headers[0]["Authorization"] == "Bearer k-secret"
    assert "k-secret" not in repr(Endpoint("http://h/v1#m", 1, "k-secret"))


def test_nothing_follows_to_another_address() -> None:
    with serve(echo) as other:
        there = {"Location": f"{other.url}/chat/completions"}
        with serve(lambda text, before: (302, there, "")) as served, pytest.raises(UserError) as told:
            list(ask(served.url, ["a"], key="k"))
    assert not other.headers
    assert f"status 302, which points to 127.0.0.1:{other.url.split(':')[2].removesuffix('/v1')}" in str(told.value)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    with serve(echo) as served:
        monkeypatch.setenv("http_proxy", served.url.removesuffix("/v1"))
        assert dict(ask("http://nowhere.example/v1", ["a"])) == {0: Response("to a", True)}
    assert served.bodies[0]["path"] == "http://nowhere.example/v1/chat/completions"


def test_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy may be another machine, and prompts for this one are not to leave it."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve(echo) as served, serve(echo) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert dict(ask(served.url, ["a"])) == {0: Response("to a", True)}
        assert (len(served.bodies), len(proxy.bodies)) == (1, 0)


def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "gopher://127.0.0.1:1")
    with pytest.raises(UserError, match=r"h/v1#the/model: cannot use the proxy of the environment \(.*gopher"):
        ask("http://h/v1", ["a"])


def test_what_is_done_is_not_asked_again_and_no_more_than_so_many_at_once() -> None:
    together = threading.Barrier(3)  # it breaks, and fails the test, unless three requests run at once

    def slow(text: str, before: int) -> Answer:
        together.wait(timeout=60)
        return completion(text)

    texts = [str(number) for number in range(20)]
    with serve(slow) as served:
        found = dict(ask(served.url, texts, done={0, 7}, timeout=60.0))
    assert found == {number: Response(str(number), True) for number in range(20) if number not in (0, 7)}
    assert not {"0", "7"} & served.asked.keys()
    assert served.most_at_once == 3


@pytest.mark.parametrize(
    "trouble",
    [
        failure(429),
        failure(500),
        failure(503, {"Retry-After": "0"}),
        (200, {}, "<html>not json"),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": 7}}]}),
        (200, {}, {"choices": [{"message": None}]}),
        (200, {}, {"error": {"message": "SECRET PROMPT", "code": 502}}),
        (503, {"Content-Length": "1000"}, "cut"),
    ],
    ids=["rate", "broken", "busy", "no json", "no choice", "no text", "no message", "error", "cut"],
)
def test_what_may_pass_is_asked_again(trouble: Answer) -> None:
    def behaviour(text: str, before: int) -> Answer:
        return trouble if before < 2 else completion(f"to {text}")

    with serve(behaviour) as served:
        assert dict(ask(served.url, ["a", "b"])) == {0: Response("to a", True), 1: Response("to b", True)}
    assert served.asked == {"a": 3, "b": 3}


def test_the_servers_own_pause_is_kept(pauses: list[float]) -> None:
    def behaviour(text: str, before: int) -> Answer:
        return failure(429, {"Retry-After": "0.4"}) if before == 0 else completion(text)

    with serve(behaviour) as served:
        list(ask(served.url, ["a"]))
    assert pauses == [0.4]


def test_a_pause_may_be_a_date(pauses: list[float]) -> None:
    def behaviour(text: str, before: int) -> Answer:
        until = format_datetime(datetime.now(UTC) + timedelta(minutes=8), usegmt=True)
        return failure(429, {"Retry-After": until}) if before == 0 else completion(text)

    with serve(behaviour) as served:
        list(ask(served.url, ["a"]))
    assert len(pauses) == 1
    assert 7 * 60 < pauses[0] <= 8 * 60  # a minute of tolerance for a busy machine


def test_a_pause_of_an_hour_is_not_waited_for() -> None:
    with serve(lambda text, before: failure(429, {"Retry-After": "3600"})) as served, pytest.raises(UserError) as told:
        list(ask(served.url, ["a"]))
    assert "status 429, which asks for a pause of 3600 s" in str(told.value)
    assert served.asked["a"] == 1


def test_pauses_grow(pauses: list[float]) -> None:
    def behaviour(text: str, before: int) -> Answer:
        return failure(429) if before < 3 else completion(text)

    with serve(behaviour) as served:
        list(ask(served.url, ["a"], first_pause=0.1))
    assert len(pauses) == 3
    for number, pause in enumerate(pauses):  # 0.1, 0.2, 0.4, each with up to 50 % of jitter in both directions
        assert 0.05 * 2**number <= pause <= 0.15 * 2**number


def test_an_answer_that_is_late_is_asked_for_again() -> None:
    again = threading.Event()

    def behaviour(text: str, before: int) -> Answer:
        if before == 0:
            again.wait(60)
        else:
            again.set()
        return completion(text)

    with serve(behaviour) as served:
        assert dict(ask(served.url, ["a"], timeout=1.0)) == {0: Response("a", True)}
    assert again.is_set()


def test_what_stays_without_an_answer_is_told_and_the_others_are_kept() -> None:
    def behaviour(text: str, before: int) -> Answer:
        if text == "late":
            over.wait(60)
        return failure(429) if text == "limited" else completion(text)

    found: dict[int, str] = {}
    over = threading.Event()

    def collect() -> None:
        for index, response in ask(served.url, ["a", "limited", "b", "late", "c"], retries=1, timeout=1.0):
            found[index] = response.text

    with serve(behaviour) as served, pytest.raises(UserError) as told:
        collect()
    over.set()
    assert found == {0: "a", 2: "b", 4: "c"}
    message = str(told.value)
    assert "2 of 5 requests got no answer" in message
    assert "1 times status 429" in message
    assert "1 times no answer in time" in message
    assert "; if the server is slow, raise timeout or lower concurrency; run the same command" in message
    assert "run the same command again" in message
    assert served.asked["limited"] == 2


def test_an_endpoint_that_is_gone_is_not_asked_forever() -> None:
    with serve(lambda text, before: failure(503)) as served, pytest.raises(UserError) as told:
        list(ask(served.url, [str(number) for number in range(100)], retries=0))
    assert len(served.bodies) < 20
    assert re.search(r", \d+ were not sent; ", str(told.value))


def test_nobody_there() -> None:
    with serve(echo) as served:
        url = served.url
    with pytest.raises(UserError, match=r"2 of 2 requests got no answer \(2 times Connection refused\)"):
        list(ask(url, ["a", "b"], retries=1))


@pytest.mark.parametrize(
    "answer",
    [
        failure(400, code="content_filter"),
        failure(403, type="content_policy_violation"),
        completion(None, "content_filter"),
    ],
)
def test_what_the_filter_declines_is_a_response_that_is_not_there(answer: Answer) -> None:
    with serve(lambda text, before: answer if text == "bad" else completion(text)) as served:
        assert dict(ask(served.url, ["bad", "a"])) == {0: Response("", True, "content filter"), 1: Response("a", True)}
    assert served.asked["bad"] == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            failure(401, code="invalid_api_key"),
            "status 401 (code invalid_api_key); the key is missing (set OPENAI_API_KEY_127_0_0_1 for this host)",
        ),
        (failure(429, code="insufficient_quota"), "status 429 (code insufficient_quota)"),
        (failure(404, type="not_found"), "status 404 (type not_found)"),
        (failure(400, param="top_p"), "status 400 (param top_p)"),
        ((400, {}, "no json"), "status 400"),
    ],
)
def test_what_will_never_work_stops_at_once_and_repeats_no_text(answer: Answer, said: str) -> None:
    with serve(lambda text, before: answer) as served, pytest.raises(UserError) as told:
        list(ask(served.url, [str(number) for number in range(50)], retries=5))
    assert said in str(told.value)
    assert "SECRET" not in str(told.value)
    assert len(served.bodies) <= REJECTIONS_BEFORE_STOPPING + 3


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("first", [True, False])
def test_what_the_endpoint_will_not_take_is_a_response_that_is_not_there(status: int, first: bool) -> None:
    """For example a prompt that is too long: wherever it stands, the others are answered."""

    def behaviour(text: str, before: int) -> Answer:
        return failure(status, code="context_length_exceeded") if text == "long" else completion(text)

    texts = ["long", "a", "b"] if first else ["a", "b", "long"]
    with serve(behaviour) as served:
        found = dict(ask(served.url, texts, concurrency=1))
    declined = Response("", True, f"status {status} (code context_length_exceeded)")
    assert [found[index] for index in range(3)] == [
        declined if text == "long" else Response(text, True) for text in texts
    ]
    assert served.asked["long"] == 1


def test_answers_on_their_way_are_kept_where_the_endpoint_refuses_all_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = threading.Event()

    class Stop(threading.Event):
        def set(self) -> None:
            super().set()
            refused.set()

    monkeypatch.setattr(
        endpoint, "threading", SimpleNamespace(Event=Stop, Lock=threading.Lock, Thread=threading.Thread)
    )

    def behaviour(text: str, before: int) -> Answer:
        if text == "b":
            return failure(401)
        assert refused.wait(60)  # both requests are on their way when the client receives the refusal
        return completion(text)

    found = []
    with serve(behaviour) as served, pytest.raises(UserError, match="status 401"):
        found.extend(ask(served.url, ["a", "b", "c", "d", "e"], timeout=60.0))
    assert sorted(found) == [(0, Response("a", True)), (2, Response("c", True))]


def test_half_an_emoji_is_no_text() -> None:
    with serve(lambda text, before: completion("ok \ud83d")) as served:
        assert dict(ask(served.url, ["a"])) == {0: Response("ok \ufffd", True)}


def test_newer_models_get_the_limit_by_its_new_name() -> None:
    both = threading.Barrier(2)

    def behaviour(text: str, before: int) -> Answer:
        if before == 0 and text != "c":
            both.wait(timeout=60)  # so that both requests are on their way before one is refused
            return failure(400, param="max_tokens", code="unsupported_parameter")
        return completion(text)

    with serve(behaviour) as served:
        assert dict(ask(served.url, ["a", "b", "c"], concurrency=2, timeout=60.0)) == {
            0: Response("a", True),
            1: Response("b", True),
            2: Response("c", True),
        }
    limits = {(body["messages"][0]["content"], body.get("max_completion_tokens")) for body in served.bodies}
    assert limits >= {("a", 48), ("b", 48), ("c", 48)}
    assert ("c", None) not in limits  # by then the client knew the new name


def test_a_limit_that_is_too_high_is_no_unknown_name() -> None:
    too_high = failure(400, param="max_tokens", code="invalid_value")
    with (
        serve(lambda text, before: too_high) as served,
        pytest.raises(UserError, match="invalid_value, param max_tokens"),
    ):
        list(ask(served.url, ["a"]))
    assert "max_tokens" in served.bodies[0]
    assert len(served.bodies) == 1


def test_learning_the_limits_name_is_no_retry() -> None:
    def behaviour(text: str, before: int) -> Answer:
        return completion(text) if before else failure(400, param="max_tokens", code="unsupported_parameter")

    with serve(behaviour) as served:
        assert dict(ask(served.url, ["a"], retries=0)) == {0: Response("a", True)}


def newer(body: dict[str, Any]) -> Answer | None:
    """In the way in which OpenAI's reasoning models refuse parameters."""
    if "max_tokens" in body:
        return failure(400, param="max_tokens", code="unsupported_parameter")
    return failure(400, param="temperature", code="unsupported_value") if "temperature" in body else None


def in_words(text: str) -> Callable[[dict[str, Any]], Answer | None]:
    """In the way in which gateways refuse a temperature, with only a message."""
    return lambda body: (400, {}, {"error": {"message": text, "code": 400}}) if "temperature" in body else None


BY_FASTAPI = {"loc": ["body", "temperature"], "msg": "must be above 0", "type": "greater_than"}


@pytest.mark.parametrize(
    "refuses",
    [
        newer,
        in_words("`temperature` is deprecated for this model."),
        lambda body: (400, {}, {"error": "temperature must be 1"}) if "temperature" in body else None,
        lambda body: failure(422, param="temperature") if "temperature" in body else None,
        lambda body: (422, {}, {"detail": [BY_FASTAPI]}) if "temperature" in body else None,
        lambda body: (422, {}, [BY_FASTAPI]) if "temperature" in body else None,
    ],
    ids=["newer", "in words", "text alone", "422", "by FastAPI", "by FastAPI, bare"],
)
def test_newer_models_are_asked_without_a_temperature_and_their_answers_say_so(
    refuses: Callable[[dict[str, Any]], Answer | None], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(echo, refuses) as served:
        found = dict(ask(served.url, ["a", "b", "c"], retries=0, concurrency=1))
    assert found == {index: Response(f"to {text}", True, None, "default") for index, text in enumerate("abc")}
    greedy = [body["messages"][0]["content"] for body in served.bodies if "temperature" in body]
    assert set(greedy) == {"a"}  # learned once
    assert [body["messages"][0]["content"] for body in served.bodies][-2:] == ["b", "c"]
    said = [line for line in capsys.readouterr().err.splitlines() if "temperature" in line]
    assert said == [f"{served.url}#the/model refuses a temperature of 0: its answers are sampled, not greedy"]


def test_requests_on_their_way_learn_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    together = threading.Barrier(3)

    def refuses(body: dict[str, Any]) -> Answer | None:
        if "temperature" in body:
            together.wait(timeout=60)
        return newer(body)

    with serve(echo, refuses) as served:
        found = dict(ask(served.url, ["a", "b", "c"], timeout=60.0))
    assert {response.decoding for response in found.values()} == {"default"}
    assert {response.text for response in found.values()} == {"to a", "to b", "to c"}
    assert capsys.readouterr().err.count("sampled") == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_prompt_about_temperature_that_is_declined_makes_nothing_less_greedy(first: bool) -> None:
    """Messages may repeat a prompt, so the client accepts a hint from one only if following it helps."""

    def behaviour(text: str, before: int) -> Answer:
        return (400, {}, {"error": {"message": f"no: {text}"}}) if "temperature" in text else completion(text)

    texts = ["lower the temperature", "a"][:: 1 if first else -1]
    with serve(behaviour) as served:
        found = dict(ask(served.url, texts, concurrency=1))
    assert found[texts.index("a")] == Response("a", True)
    assert found[texts.index("lower the temperature")] == Response("", True, "status 400")
    assert served.asked["lower the temperature"] == (2 if first else 1)
    assert all("temperature" in body for body in served.bodies if body["messages"][0]["content"] == "a")


def test_empty_answers_are_answers() -> None:
    with serve(lambda text, before: completion("" if text == "a" else None)) as served:
        assert dict(ask(served.url, ["a", "b"])) == {0: Response("", True), 1: Response("", True)}


class Drip:
    """A server on this machine that answers one request with ``head``, then piece by piece, and an answer at last."""

    PIECES = 100

    def __init__(self, head: bytes, piece: bytes, pause: float) -> None:
        self.sent = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        self.thread = threading.Thread(target=self._answer, args=(head, piece, pause), daemon=True)
        self.thread.start()

    def _answer(self, head: bytes, piece: bytes, pause: float) -> None:
        connection, _ = self._listening.accept()
        # The client closes the connection when it has had enough.
        with self._listening, connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(head)
            while self.sent < self.PIECES:
                connection.sendall(piece)
                self.sent += 1
                time.sleep(pause)
            connection.sendall(json.dumps(completion("at last")[2]).encode())


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
@pytest.mark.parametrize(
    ("piece", "pause", "timeout", "said"),
    [(b" ", 0.05, 0.5, "no answer in time"), (b" " * (1 << 20), 0, 60.0, "an answer that is not a chat completion")],
    ids=["slowly", "fast"],
)
def test_an_answer_without_end_is_no_answer(status: str, piece: bytes, pause: float, timeout: float, said: str) -> None:
    """Each byte comes in time, so only a limit for the whole answer ends this."""
    drip = Drip(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n\r\n".encode(), piece, pause)
    with pytest.raises(UserError) as told:
        list(ask(drip.url, ["a"], timeout=timeout, retries=0))
    assert (said if status == "200 OK" else "status 400") in str(told.value)
    drip.thread.join(20)
    assert drip.sent < drip.PIECES


@pytest.mark.parametrize(
    "body",
    [
        "<html><body>SECRET PROMPT</body></html>",
        '{"choices": [{"message": {"content": "SECRET PRO',
        '{"choices": []}',
        '{"choices": null}',
        "[" * 100_000,
        "",
        "null",
    ],
)
def test_what_is_no_completion_is_told_without_its_text(body: str) -> None:
    with serve(lambda text, before: (200, {}, body)) as served, pytest.raises(UserError) as told:
        list(ask(served.url, ["a"], retries=1))
    assert str(told.value).count("an answer that is not a chat completion") == 1
    assert "SECRET" not in str(told.value)
    assert len(served.bodies) == 2


def test_who_stops_does_not_wait_for_answers_on_their_way() -> None:
    stopped, waited = threading.Event(), []

    def slow(text: str, before: int) -> Answer:
        if text == "slow":
            waited.append(not stopped.wait(30))
        return completion(text)

    with serve(slow) as served:
        answers = ask(served.url, ["slow", "a"], timeout=60.0)
        assert next(answers) == (1, Response("a", True))
        answers.close()  # type: ignore[attr-defined]  # as Ctrl-C does
        stopped.set()
        while not waited:
            time.sleep(0.01)
    assert waited == [False]
