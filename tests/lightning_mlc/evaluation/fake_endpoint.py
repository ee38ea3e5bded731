"""An OpenAI-compatible endpoint on this machine, with failures that a test chooses."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]
"""Status, headers and body. A text is sent unchanged, anything else as JSON."""
Behaviour = Callable[[str, int], Answer]
"""Gives the answer for the text of the last message and the number of earlier requests with it."""
Refuses = Callable[[dict[str, Any]], Answer | None]
"""Gives the refusal of a whole request, or None. A refused request does not count as an earlier one."""


def completion(text: str | None, finish_reason: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {}, {"object": "chat.completion", "choices": [choice]}


def failure(status: int, headers: dict[str, str] | None = None, **details: str) -> Answer:
    return status, headers or {}, {"error": {"message": "SECRET PROMPT", **details}}


class Served:
    """The requests that the endpoint has received."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.asked: Counter[str] = Counter()
        self.at_once = 0
        self.most_at_once = 0


@contextmanager
def serve(behaviour: Behaviour, refuses: Refuses = lambda body: None) -> Iterator[Served]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            with lock:
                served.bodies.append({"path": self.path, **body})
                served.headers.append(dict(self.headers))
                before = served.asked[text]
                served.asked[text] += 1
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            try:
                status, headers, content = refuses(body) or behaviour(text, before)
                with lock:
                    served.at_once -= 1  # before the client can see the answer and send the next request
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has given up
                pass

        def do_GET(self) -> None:  # reached if a redirection was followed
            with lock:
                served.headers.append(dict(self.headers))
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
