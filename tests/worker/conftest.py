"""Web servers that images are fetched from, names that look-ups give, what a refusal must say; and a model of noise."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import SecretStr

from worker.backbones import Backbone, build
from worker.contract import ImageRef, RuntimeOptions
from worker.encode import Embedding, encode
from worker.images import addresses, fetch
from worker.images.errors import ImageError

PICTURE = b"bytes of a picture"
SECRET = "0123456789abcdef"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """The shipped architecture with random weights; a module that needs another model has a fixture of its own."""
    torch.set_num_threads(2)
    return build("tiny", random_weights=True, seed=0, device="cpu")


@pytest.fixture(scope="module")
def embedding(backbone: Backbone) -> Embedding:
    image = np.random.default_rng(0).integers(0, 255, (120, 300, 3), dtype=np.uint8)  # its last rows are padding
    return encode(backbone, image)


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


class Anything(dict[str, Any]):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def get(self, key: str, default: Any = None) -> Any:
        return self.answer


@pytest.fixture
def victim(other: Server) -> Server:
    """Answers everything, on this machine."""
    other.answers = Anything(lambda handler: handler.reply(200, PICTURE))  # type: ignore[assignment]
    return other


def options(label_studio: Server | None = None, **more: Any) -> RuntimeOptions:
    return RuntimeOptions(
        data_dir=Path("unused"),
        label_studio_url=label_studio.url if label_studio else None,
        label_studio_api_key=SecretStr(SECRET),
        **{"fetch_timeout_s": 5.0, **more},
    )


def refused(url: str, with_options: RuntimeOptions, **ref: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        fetch.fetch(ImageRef(url=url, **ref), with_options)
    assert 400 <= caught.value.status < 600
    assert caught.value.error
    assert caught.value.hint
    assert SECRET not in str(caught.value)
    return caught.value


def names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[list[str]]:
    """Let look-ups give these answers, one after the other, the last one again and again; returns those given."""
    given: list[list[str]] = []

    def lookup(host: str, port: int, **how: Any) -> list[Any]:
        given.append(answers[min(len(given), len(answers) - 1)])
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in ip], socket.SOCK_STREAM, 6, "", (ip, port)) for ip in given[-1]]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", lookup)
    return given


class DeadEnds(list[str]):
    """Sockets that only note where they should connect to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        outer = self

        class Socket:
            def __init__(self, *args: Any) -> None:
                self.limit = 0.0

            def settimeout(self, value: float) -> None:
                self.limit = value

            def close(self) -> None: ...

            def connect(self, target: Any) -> None:
                outer.append(target[0])
                time.sleep(min(seconds, self.limit))
                raise ConnectionRefusedError

        super().__init__()
        monkeypatch.setattr(addresses.socket, "socket", Socket)
