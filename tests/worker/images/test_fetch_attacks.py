"""What a task's URL may try: reach into the network, climb out of routes, get the token sent elsewhere.

In each case the address that must not be reached is a server that really listens; what counts is that it is not asked,
and that nothing connects to any other private address.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.worker.conftest import PICTURE, SECRET, Anything, DeadEnds, Server, names, options, refused
from worker.contract import ImageRef
from worker.images import fetch
from worker.images.addresses import is_public

PORT = "{port}"


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every address that anything connects to during a test."""
    targets: list[Any] = []
    connect = socket.socket.connect

    def note(sock: socket.socket, target: Any) -> None:
        targets.append(target)
        connect(sock, target)

    monkeypatch.setattr(socket.socket, "connect", note)
    yield targets


PRIVATE = [
    "127.0.0.1",
    "127.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0x7f.0x0.0x0.0x1",
    "0177.0.0.1",
    "017700000001",
    "0",
    "0.0.0.0",
    "localhost",
    "localhost.",
    "LOCALHOST",
    "127.0.0.1.",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "169.254.43518",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.1",
    "192.0.0.192",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:169.254.169.254]",
    "[::ffff:0:127.0.0.1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2001:0:0:0:0:0:0:1]",
    "[fe80::1]",
    "[fe80::1%25lo]",
    "[fc00::1]",
    "[fd12:3456::1]",
    "[3fff::1]",
    "[fd00:ec2::254]",
    "[fec0::1]",
    "[ff02::1]",
    "[2001:db8::1]",
    "user:pass@127.0.0.1",
    "example.com@127.0.0.1",
    "example.com%40@127.0.0.1",
    "127.0.0.1%2f.example.com",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "ⓛocalhost",
    "127.0.0.1%00.example.com",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_hosts_are_refused_before_anything_is_sent(victim: Server, connected: list[Any], host: str) -> None:
    error = refused(f"http://{host}:{victim.port}/a.png", options())
    assert error.status in (400, 403, 502)
    assert victim.asked == []
    assert connected == []


@pytest.mark.parametrize(
    "url",
    [
        f"HTTP://127.0.0.1:{PORT}/a",
        f"http:127.0.0.1:{PORT}/a",
        f"http:/127.0.0.1:{PORT}/a",
        f"http:///127.0.0.1:{PORT}/a",
        f"http:\\\\127.0.0.1:{PORT}/a",
        f"http://127.0.0.1:{PORT}\\@example.invalid/a",
        f"http://example.invalid\\@127.0.0.1:{PORT}/a",
        f"http://example.invalid#@127.0.0.1:{PORT}/a",
        f"http://example.invalid?@127.0.0.1:{PORT}/a",
        f"http://127.0.0.1:{PORT}#.example.invalid/a",
        f"http://example.invalid@x@127.0.0.1:{PORT}/a",
        f"http://[::1%25]@127.0.0.1:{PORT}/a",
        f"http://127.0.0.1:0{PORT}/a",
        f"http://127.0.0.1:{PORT}/a\r\nHost: example.invalid",
        f"http://127.0.0.1\r\n:{PORT}/a",
        f"\thttp://127.0.0.1:{PORT}/a ",
        f"//127.0.0.1:{PORT}/a",
        f"\\\\127.0.0.1:{PORT}\\a",
        "http://[::1",
        "http://",
        "http:///a",
        "http://:80/a",
        "http://127.0.0.1:99999/a",
        "https://127.0.0.1:{port}/a",
        "ftp://127.0.0.1/a.png",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "dict://127.0.0.1:6379/info",
        "javascript:alert(1)",
        "jar:http://127.0.0.1!/",
        "file://example.com/etc/passwd",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "file:etc/passwd",
        "unix:///var/run/docker.sock",
        "C:\\secret.png",
        "",
        "a.png",
        "http://example.com/" + "a" * 10_000,
        "A" * 3_000_000,
    ],
)
def test_other_forms_of_a_url_get_no_further(victim: Server, connected: list[Any], url: str) -> None:
    error = refused(url.replace(PORT, str(victim.port)), options())
    assert error.status in (400, 403, 404, 502)
    assert len(str(error)) < 1000
    assert victim.asked == []
    assert connected == []


REDIRECTS = [
    f"http://127.0.0.1:{PORT}/secret",
    f"http://[::1]:{PORT}/secret",
    f"http://2130706433:{PORT}/secret",
    f"http://localhost:{PORT}/secret",
    f"//127.0.0.1:{PORT}/secret",
    f"https://127.0.0.1:{PORT}/secret",
    "http://169.254.169.254/latest/meta-data/",
    "file:///etc/passwd",
    "/data/upload/%2e%2e/%2e%2e/api/current-user/token",
    "/data/local-files/?d=../../etc/passwd",
    "ftp://127.0.0.1/a",
    "data:image/png;base64,AAAA",
    "http://[::1",
]


@pytest.mark.parametrize(
    ("status", "target"),
    [*((302, target) for target in REDIRECTS), *((status, REDIRECTS[0]) for status in (301, 303, 307, 308))],
)
def test_a_redirect_of_a_trusted_host_gets_no_further(
    label_studio: Server, victim: Server, status: int, target: str
) -> None:
    label_studio.says("/data/upload/3/a.png", status, b"", Location=target.replace(PORT, str(victim.port)))
    assert refused("/data/upload/3/a.png", options(label_studio)).status in (400, 403, 404, 502)
    assert victim.asked == []
    assert [path for _, path, _ in label_studio.asked] == ["/data/upload/3/a.png"]


def test_the_token_does_not_follow_a_redirect_there_and_back(label_studio: Server, other: Server) -> None:
    label_studio.says("/data/upload/3/b.png")
    label_studio.sends("/data/upload/3/a.png", f"{other.url}/x")
    other.sends("/x", f"{label_studio.url}/data/upload/3/b.png")
    allowed = options(label_studio, allowed_hosts=("127.0.0.1",))
    assert fetch.fetch(ImageRef(url="/data/upload/3/a.png"), allowed) == PICTURE
    assert [given for _, _, given in (*label_studio.asked, *other.asked)] == [f"Token {SECRET}", None, None]


CLIMBS = [
    "/data/local-files/?d=../../etc/passwd",
    "/data/local-files/?d=a/..%2f..%2fetc/passwd",
    "/data/local-files/?d=%252e%252e/etc/passwd",
    "/data/local-files/?d=%25252e%25252e/etc/passwd",
    "/data/local-files/?d=..\\..\\etc",
    "/data/local-files/?x=1&d=../../etc/passwd",
    "/data/local-files?d=..%5c..%5cetc",
    "/data/upload/../../api/current-user/token",
    "/data/upload/%2e%2e/%2e%2e/api/current-user/token",
    "/data/upload/3/%2E./%2E%2E/api/current-user/token",
    "/data/upload/3/..%5c..%5capi",
    "upload/../../api/users",
    "data/upload/../../api/users",
    "/storage-data/uploaded/?filepath=upload/../../secret",
    "/tasks/1/resolve/../../../api/users",
]


@pytest.mark.parametrize("url", CLIMBS)
@pytest.mark.parametrize("absolute", [False, True])
def test_paths_of_label_studio_cannot_climb(label_studio: Server, url: str, absolute: bool) -> None:
    """An absolute URL whose dots are not encoded is another path, to which no token goes."""
    label_studio.answers = Anything(lambda handler: handler.reply(200, PICTURE))  # type: ignore[assignment]
    if absolute and "/../" in url.partition("?")[0]:
        assert fetch.fetch(ImageRef(url=f"{label_studio.url}/{url.lstrip('/')}"), options(label_studio)) == PICTURE
        assert [given for _, _, given in label_studio.asked] == [None]
        return
    assert refused(f"{label_studio.url}/{url.lstrip('/')}" if absolute else url, options(label_studio)).status == 403
    assert label_studio.asked == []


def test_a_name_whose_answer_changes_is_connected_where_it_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: every look-up counts, and what is connected to is what was looked at."""
    given = names(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    reached = DeadEnds(monkeypatch)
    assert refused("http://rebind.example/a.png", options()).status == 403
    assert reached == ["8.8.8.8"]
    assert given[:2] == [["8.8.8.8"], ["127.0.0.1"]]


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["fe80::1%eth0"],
        ["169.254.169.254", "10.0.0.1"],
        ["64:ff9b::a00:1", "192.168.0.1"],
    ],
)
def test_a_public_name_of_a_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, answer: list[str], label_studio: Server
) -> None:
    names(monkeypatch, answer)
    reached = DeadEnds(monkeypatch)
    assert refused("http://internal.example/a.png", options()).status == 403
    assert refused("https://internal.example/a.png", options(label_studio)).status == 403
    assert reached == []


def test_of_several_addresses_only_public_ones_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, ["10.0.0.1", "8.8.8.8", "::1", "2606:4700:4700::1111"])
    reached = DeadEnds(monkeypatch)
    refused("http://both.example/a.png", options())
    assert set(reached) == {"8.8.8.8", "2606:4700:4700::1111"}


def test_an_allowed_host_is_that_host_alone(victim: Server) -> None:
    allowed = options(allowed_hosts=(f"127.0.0.1:{victim.port}",))
    assert fetch.fetch(ImageRef(url=f"{victim.url}/a.png"), allowed) == PICTURE
    victim.asked.clear()
    for host in (f"127.0.0.1:{victim.port + 1}", f"localhost:{victim.port}", f"127.1:{victim.port}"):
        assert refused(f"http://{host}/a.png", allowed).status in (403, 502)
    assert victim.asked == []


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)
