"""Web servers that images are fetched from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

PICTURE = b"bytes of a picture"


class Server:
    """A web server on 127.0.0.1 that records what it was asked and answers what the test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.command, self.path, self.headers.get("Authorization")))
                answer = outer.answers.get(self.path.partition("?")[0])
                if answer is None:
                    self.reply(404)
                else:
                    answer(self)

            do_POST = do_GET

            def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def says(self, path: str, status: int = 200, body: bytes = PICTURE, **headers: str) -> None:
        self.answers[path] = lambda handler: handler.reply(status, body, **headers)  # type: ignore[attr-defined]

    def sends(self, path: str, to: str) -> None:
        self.says(path, 302, b"", Location=to)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def label_studio() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def other() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()
