"""Thousands of broken and hostile requests to a real server: `scripts/fuzz --requests 20000`.

`bald-sam serve` runs in a process of its own with its real model. Requests are captured ones of Label Studio with
values exchanged, fields dropped and bytes flipped, bytes that are no HTTP, and images that are none. None may be
answered with 500 or a traceback, an ordinary click must be answered in between, and the server's memory must not grow.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

CAPTURED = Path(__file__).parent / "fixtures" / "label_studio"
#: As long as Label Studio waits.
LIMIT_S = 100.0
#: What a server needs to have seen before its memory is looked at, as a share of all requests: by then its caches
#: (32 MB of embeddings, pages of SQLite, 256 configs, 10,000 arms) and the allocator's pools are as full as they get.
WARM = 0.5
#: Answers that refuse in words; 500 is never one.
SPOKEN = {502, 503, 504}
ROUTES = ["/", "/health", "/versions", "/metrics", "/status", "/report", "/jobs", "/training", "/predict", "/setup"]
ROUTES += ["/webhook", "/nowhere", "/predict/", "//predict", "/%2e%2e/etc/passwd", "/static/../app.py", "/report/%00"]


def captured() -> list[tuple[str, dict[str, Any]]]:
    """(route, body) of what Label Studio sends."""
    found = []
    for path in sorted(CAPTURED.glob("*.json")):
        route = {"predict": "/predict", "setup": "/setup", "webhook": "/webhook"}.get(path.stem.partition("_")[0])
        content = json.loads(path.read_text())
        body = content.get("body", content) if isinstance(content, dict) else None
        if route and isinstance(body, dict) and ("tasks" in body or route != "/predict"):
            found.append((route, body))
    assert len(found) > 8
    return found


# --- images -----------------------------------------------------------------------------------------------------------


def picture(kind: str, size: tuple[int, int] = (48, 32), **how: Any) -> bytes:
    """A small image file."""
    image = Image.effect_noise(size, 60).convert(how.pop("mode", "RGB"))
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and packs them well."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(min((3 * width + 1) * height, 1 << 22)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def hostile_image(rng: random.Random) -> bytes:
    """Truncated, flipped, mistaken, too large, or two things at once."""
    good = picture(rng.choice(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
    kind = rng.randrange(8)
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        return flip(rng, good)
    if kind == 2:
        return bomb(rng.choice([1, 60_000, 2**31 - 1]), rng.choice([1, 60_000, 2**31 - 1]))
    if kind == 3:
        return good + b"PK\x03\x04<script>alert(1)</script>" + good[:50]
    if kind == 4:
        return b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + good[10:]
    if kind == 5:
        return rng.choice(
            [b"", b"%PDF-1.7", b"%!PS-Adobe\n", b"<svg onload='x'/>", b"\x7fELF", b"\x00\x00\x01\x00" * 9]
        )
    if kind == 6:
        return picture("PNG", mode=rng.choice(["1", "L", "LA", "P", "RGBA", "I;16"]))
    return good


# --- mutation ---------------------------------------------------------------------------------------------------------


def hostile_value(rng: random.Random) -> Any:
    """Something that was not expected there."""
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 0.1, 1e308, float("nan"), float("inf"),
            "", "0", "-1", "null", "\x00", "\ud800", "é" * 50, "A" * 20_000, "../../etc/passwd", "/etc/passwd",
            "file:///etc/passwd", "http://127.0.0.1:1/", "http://[::1]/", "s3://a/b", "data:image/png;base64,AAAA",
            "<View/>", "<View>" * 3000, "<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><View>&b;</View>",
            "{{7*7}}", "%s%n", "'; DROP TABLE clicks; --", "$(id)", "\r\nX-Evil: 1", [], {}, [[]], [None], {"": None},
            [0] * 5000, {"a": {"a": {"a": {}}}}, "99999999999999999999", "1e5", "2026-13-45", [{}] * 600,
        ]
    )  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of every value inside; masks count as one."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, list) and len(value) > 100:
        items = ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A copy with one to four places changed."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 4)):
        path = rng.choice(list(places(body)) or [()])
        target: Any = body
        for key in path[:-1]:
            target = target[key]
        if not path:
            break
        kind = rng.randrange(5)
        if kind == 0:
            del target[path[-1]]
        elif kind == 1 and isinstance(target, list):
            target.extend(copy.deepcopy(target[-3:]) * rng.choice([1, 20]))
        elif kind == 2 and isinstance(target, dict):
            target[rng.choice(["id", "type", "value", "rle", "", "\x00", "__proto__"])] = target.pop(path[-1])
        elif kind == 3 and isinstance(value := target[path[-1]], (int, float)) and abs(value) < 1e300:
            target[path[-1]] = value * rng.choice([-1, 0.5, 1e3, 1e12]) + rng.random()
        else:
            target[path[-1]] = hostile_value(rng)
    return body


def flip(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut out, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(changed) or 1)
        kind = rng.randrange(4)
        if kind == 0 and changed:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randrange(64)]
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.randrange(64)]
        elif kind == 3 and rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def click_on(image: bytes, body: dict[str, Any]) -> dict[str, Any]:
    """A captured click, on an image that travels in the request."""
    body = copy.deepcopy(body)
    body["tasks"][0]["data"]["image"] = "data:image/png;base64," + base64.b64encode(image).decode()
    for region in (body["params"].get("context") or {}).get("result", []):
        region |= {"original_width": 48, "original_height": 32}
    return body


def post(route: str, content: bytes, headers: str = "Content-Type: application/json\r\n") -> bytes:
    """An HTTP request."""
    head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def get(path: bytes, header: bytes = b"Host: localhost", method: bytes = b"GET") -> bytes:
    """An HTTP request without a body."""
    return b"%s %s HTTP/1.1\r\n%s\r\nConnection: close\r\n\r\n" % (method, path, header)


def raw(rng: random.Random, good: bytes) -> bytes:
    """What is hardly HTTP."""
    return rng.choice(
        [
            flip(rng, good[:2000]),
            b"\x00" * rng.randrange(1, 5000),
            bytes(rng.randrange(256) for _ in range(200)) + b"\r\n\r\n",
            b"GET /health\r\n\r\n",
            b"GET /health HTTP/9.9\r\n\r\n",
            b"BREW /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 30_000 + b"\r\n",
            b"GET / HTTP/1.1\r\nA" + b"b" * 300_000 + b"\r\n\r\n",
            b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n" + good[:100],
            b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + good[:100],
            b"POST /predict HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n{}",
            b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\n{}",
            b"POST /predict HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n{}",
            b"POST /predict HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
            get(b"/report?" + rng.choice([b"project=" + b"9" * 500, b"since=%00", b"until=2026-99-99", b"project=-1"])),
            get(b"/status?format=" + rng.choice([b"%3Cscript%3E", b"xml", b"html"])),
            get(b"/", b"Authorization: " + rng.choice([b"Basic %%", b"Bearer \xff", b"Digest a", b"Basic QQ" * 999])),
            get(
                rng.choice(ROUTES).encode(),
                b"Host: \xff\r\nAccept: " + rng.choice([b"*/*", b"text/html", b"q=;;,", b"\xff"]),
                rng.choice([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"PATCH"]),
            ),
        ]
    )  # fmt: skip


def requests(seed: int, count: int) -> Iterator[bytes]:
    """So many requests, the same for the same seed."""
    rng = random.Random(seed)
    bodies = captured()
    clicks = [body for route, body in bodies if route == "/predict" and body["params"].get("context")]
    for _ in range(count):
        kind = rng.random()
        route, body = rng.choice(bodies)
        if kind < 0.10:
            body = click_on(hostile_image(rng), rng.choice(clicks))
            yield post("/predict", dump(body if rng.random() < 0.6 else mutate(rng, body)))
        elif kind < 0.70:
            yield post(route if rng.random() < 0.95 else rng.choice(ROUTES), dump(mutate(rng, body)))
        elif kind < 0.85:
            yield post(route, flip(rng, dump(body)))
        else:
            yield raw(rng, post(route, dump(body)))


def dump(body: Any) -> bytes:
    """JSON, with what is no Unicode left as it is."""
    return json.dumps(body).encode()


# --- the server and what is expected of it ----------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[tuple[int, psutil.Process, Path]]:
    """`bald-sam serve` with its model in it: port, process and log."""
    log = folder / "server.log"
    own = {"BALD_SAM_DATA_DIR": str(folder / "data"), "BALD_SAM_CACHE_MB": "32", "BALD_SAM_LOG_LEVEL": "warning"}
    # A Label Studio that is down: what would be fetched from it or pushed to it later is tried, too.
    own |= {"LABEL_STUDIO_URL": "http://127.0.0.1:9", "LABEL_STUDIO_API_KEY": "0" * 40}
    own |= {"BALD_SAM_TRAIN_AFTER": "1", "BALD_SAM_ARMS": "mixed", "BALD_SAM_FETCH_TIMEOUT_S": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BALD_SAM_", "LABEL_STUDIO_"))}
    command = [sys.executable, "-m", "ml_backend.cli", "serve", "--port", "0", "--device", "cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**kept, **own, "PYTHONUNBUFFERED": "1"}, stdout=output, stderr=output)
    try:
        end = time.monotonic() + LIMIT_S
        while (port := re.search(r"listens on http://[^ ]*:(\d+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.1)
        yield int(port[1]), psutil.Process(process.pid), log
    finally:
        process.terminate()
        process.wait(20)


def ask(port: int, request: bytes) -> bytes:
    """The answer, or as much as came of it; empty where the connection was closed without one."""
    answer = bytearray()
    with (
        suppress(ConnectionError, BrokenPipeError),
        socket.create_connection(("127.0.0.1", port), LIMIT_S) as connection,
    ):
        with suppress(ConnectionError):
            connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        try:
            while chunk := connection.recv(65_536):
                answer += chunk
        except TimeoutError:
            return b"no answer in time"
    return bytes(answer)


@dataclass
class Report:
    """What came back. `wrong`: what must not have."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    clicks: int = 0

    def judge(self, request: bytes, answer: bytes) -> None:
        """Count one answer."""
        status = (
            answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.") else "none" if not answer else "strange"
        )
        self.statuses[status] += 1
        body = answer.partition(b"\r\n\r\n")[2]
        bad = status == "strange" or b"Traceback" in answer or b'File "/' in answer
        if status.startswith("5"):
            bad |= int(status) not in SPOKEN or not (b'"error"' in body and b'"hint"' in body)
            bad &= not (status == "501" and b"waitress" not in body)  # a transfer encoding that nobody understands
        if bad:
            self.wrong.append(f"{status}: {request[:300]!r} ... {request[-200:]!r} -> {answer[:400]!r}")


def fuzz(
    port: int, process: psutil.Process, seed: int, count: int, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Send requests from four threads; an ordinary click after each hundred."""
    report = Report()
    good = post("/predict", dump(click_on(picture("PNG"), next(b for r, b in captured() if _is_click(r, b)))))
    stream = requests(seed, count)
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for done in range(0, count, 100):
            batch = list(itertools.islice(stream, 100))
            for request, answer in zip(batch, pool.map(lambda one: ask(port, one), batch), strict=True):
                report.judge(request, answer)
            answer = ask(port, good)
            report.clicks += 1
            if not answer.startswith(b"HTTP/1.1 200") or b'"brushlabels"' not in answer:
                report.wrong.append(f"an ordinary click: {answer[:300]!r}")
            report.memory.append(process.memory_info().rss / 1e6)
            if done % 1000 == 0:
                say(f"{done + len(batch)} requests, {time.monotonic() - started:.0f} s, {report.memory[-1]:.0f} MB")
    return report


def _is_click(route: str, body: dict[str, Any]) -> bool:
    results = ((body.get("params") or {}).get("context") or {}).get("result", []) if route == "/predict" else []
    return any("is_positive" in region for region in results)


def traces(log: str) -> Counter[str]:
    """The ends of the tracebacks in a log, and how often each is there."""
    found: Counter[str] = Counter()
    for part in log.split("Traceback (most recent call last):\n")[1:]:
        lines = list(itertools.takewhile(lambda line: not re.match(r"\d{4}-\d\d-", line), part.splitlines()))
        found["\n".join(line[:300] for line in lines[-5:])] += 1
    return found


def main() -> int:
    """Exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=24.0, help="MB by which the server may grow in the second half")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (port, process, log):
        report = fuzz(port, process, chosen.seed, chosen.requests, lambda line: print(line, flush=True))
        said = log.read_text()
    warm = report.memory[int(len(report.memory) * WARM)]
    growth = report.memory[-1] - warm
    faults = traces(said)
    print(f"{chosen.requests} requests, seed {chosen.seed}: {dict(sorted(report.statuses.items()))}")
    print(f"{report.clicks} ordinary clicks in between; {sum(faults.values())} tracebacks in the log")
    end, most = report.memory[-1], max(report.memory)
    print(f"memory {warm:.0f} MB after a half, {end:.0f} MB at the end, {most:.0f} MB at most")
    for line in report.wrong[:20]:
        print("WRONG", line)
    for trace, times in faults.most_common(12):
        print(f"{times} times:\n{trace}")
    return 1 if report.wrong or faults or growth > chosen.growth else 0


if __name__ == "__main__":
    sys.exit(main())
