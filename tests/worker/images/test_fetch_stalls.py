"""What a server or a name may try to hold a worker with: waiting, dead addresses, packed bombs, lengths that lie."""

from __future__ import annotations

import gzip
import threading
import time
import tracemalloc
from typing import Any

import pytest

from tests.worker.conftest import Anything, DeadEnds, Server, names, options, refused
from worker.images import addresses


def in_time(call: Any, seconds: float = 20.0) -> Any:
    """What `call` gives, or a failure when it takes far longer than it may."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "still not given up"
    return found[0]


def test_a_server_cannot_say_how_long_to_wait(victim: Server) -> None:
    victim.answers = Anything(lambda handler: handler.reply(503, b"", Retry_After="86400"))  # type: ignore[assignment]
    allowed = options(allowed_hosts=("127.0.0.1",))
    assert in_time(lambda: refused(f"{victim.url}/a.png", allowed)).status == 502


def test_a_name_with_many_dead_addresses_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, [f"8.8.{number}.8" for number in range(200)])
    reached = DeadEnds(monkeypatch, seconds=0.3)
    assert in_time(lambda: refused("http://dead.example/a.png", options(fetch_timeout_s=1.0))).status == 504
    assert len(reached) < 20


def test_a_name_that_nobody_answers_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *args, **how: time.sleep(60))
    assert in_time(lambda: refused("http://slow.example/a.png", options(fetch_timeout_s=0.3))).status == 504


@pytest.mark.parametrize("encodings", [1, 3, 50])
def test_a_packed_bomb_is_counted_as_it_unpacks(victim: Server, encodings: int) -> None:
    """A quarter of a gigabyte of zeros, packed once or more."""
    body = gzip.compress(bytes(1 << 28), 1)
    for _ in range(min(encodings, 3) - 1):
        body = gzip.compress(body)
    name = ", ".join(["gzip"] * encodings)
    victim.answers = Anything(lambda handler: handler.reply(200, body, Content_Encoding=name))  # type: ignore[assignment]
    allowed = options(allowed_hosts=("127.0.0.1",), max_image_mb=2)
    tracemalloc.start()
    try:
        error = refused(f"{victim.url}/a.png", allowed)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.status in (413, 502)
    assert peak < 64 << 20


def test_a_length_that_lies_is_no_way_around_the_limit(victim: Server) -> None:
    def lie(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "-1")
        handler.end_headers()
        handler.wfile.write(b"x" * (3 << 20))

    victim.answers = Anything(lie)  # type: ignore[assignment]
    error = refused(f"{victim.url}/a.png", options(allowed_hosts=("127.0.0.1",), max_image_mb=1))
    assert error.status in (413, 502)
