"""The real server as `bald-sam serve` starts it, with workers behind Redis or without, and clicks over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from evaluation.bench.setup import Bench

BALD_SAM = [sys.executable, "-W", "ignore", "-m", "ml_backend.cli"]
READY_S = 300.0
_STAGE = re.compile(rb'^bald_sam_stage_seconds_sum\{stage="(\w+)"\} (\S+)$', re.MULTILINE)


class ServerError(RuntimeError):
    """A process of the benchmark did not come up; its last words are in the message."""


class Page:
    """An open page of Label Studio, as far as the server can tell: one connection that stays open. Not thread-safe."""

    def __init__(self, address: str, label_config: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
        self._label_config = label_config

    def open(self, image: Path, task: int) -> None:
        """What Label Studio sends when a task is opened; the image is encoded in the background."""
        self._post(self._body(image, task, None))

    def click(self, image: Path, task: int, session: str, clicks: Sequence[tuple[float, float, bool]]) -> float:
        """Milliseconds from the request with these clicks, (x %, y %, positive), to the last byte of its answer."""
        prompts = [
            {
                "id": f"{session}-{number}",
                "type": "keypoint",
                "from_name": "kp",
                "to_name": "image",
                "is_positive": positive,
                "original_width": 1,
                "original_height": 1,
                "image_rotation": 0,
                "value": {"x": x, "y": y, "width": 0.5, "labels": []},
            }
            for number, (x, y, positive) in enumerate(clicks)
        ]
        return self._post(self._body(image, task, prompts))

    def stages(self) -> dict[str, float]:
        """Milliseconds that the server has spent in each stage of all clicks so far."""
        self._connection.request("GET", "/metrics")
        text = self._connection.getresponse().read()
        return {name.decode(): 1000 * float(seconds) for name, seconds in _STAGE.findall(text)}

    def health(self) -> dict[str, Any]:
        """What /health says."""
        self._connection.request("GET", "/health")
        found: dict[str, Any] = json.loads(self._connection.getresponse().read())
        return found

    def close(self) -> None:
        self._connection.close()

    def _body(self, image: Path, task: int, prompts: list[dict[str, Any]] | None) -> bytes:
        if prompts:
            width, height = _size(image)
            for prompt in prompts:
                prompt |= {"original_width": width, "original_height": height}
        body = {
            "tasks": [{"id": task, "data": {"image": str(image)}, "drafts": []}],
            "project": "1.1",
            "label_config": self._label_config,
            "params": {"context": {"result": prompts} if prompts else None},
        }
        return json.dumps(body).encode()

    def _post(self, body: bytes) -> float:
        began = time.perf_counter()
        self._connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        spent = 1000 * (time.perf_counter() - began)
        if answer.status != 200:
            raise ServerError(f"The server answered {answer.status}: {text.decode(errors='replace')[:300]}")
        return spent


class Server:
    """A running server. `pid`: of the process that holds the model; `listening`, `ready`: seconds from its start."""

    def __init__(self, address: str, label_config: str, pid: int, redis_url: str | None) -> None:
        self.address, self.pid, self.redis_url = address, pid, redis_url
        self.listening = self.ready = 0.0
        self._label_config = label_config

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A new page, closed at the end."""
        page = Page(self.address, self._label_config)
        try:
            yield page
        finally:
            page.close()


def has_redis() -> bool:
    """Whether the path over Redis can be measured here."""
    return shutil.which("redis-server") is not None


def shared(bench: Bench, backbone: str, *, queue: bool = False) -> Server:
    """A server that all parts of the run may use, started when the first does. Raises as `serving`."""
    if (backbone, queue) not in bench.servers:
        starting = serving(bench, backbone, queue=queue, EMBEDDINGS_DIR=str(bench.embeddings))
        server = bench.running.enter_context(starting)
        bench.servers[backbone, queue] = server
    found: Server = bench.servers[backbone, queue]
    return found


@contextmanager
def serving(bench: Bench, backbone: str, *, queue: bool = False, **settings: str) -> Iterator[Server]:
    """`bald-sam serve`, ready to answer; `queue`: with a Redis and one `bald-sam worker` of its own.

    Raises ServerError, with what the process said last, when it does not come up.
    """
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        environment = bench.environment(backbone, **{"DATA_DIR": f"{folder}/data", **settings})
        redis_url, began, model = None, time.perf_counter(), None
        if queue:
            port = _free_port()
            options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
            stack.enter_context(_process(["redis-server", *options], environment, Path(folder) / "redis.log"))
            redis_url = environment["BALD_SAM_REDIS_URL"] = f"redis://127.0.0.1:{port}/0"
            model = stack.enter_context(_process([*BALD_SAM, "worker"], environment, Path(folder) / "worker.log"))
        log = Path(folder) / "serve.log"
        web = stack.enter_context(_process([*BALD_SAM, "serve", "--port", "0"], environment, log))
        line = _first_line(web, log)
        address = re.search(r"http://\S+", line)
        if address is None:
            raise ServerError(f"The server does not start: {line or _last_words(log)}")
        server = Server(address.group(), bench.label_config, (model or web).pid, redis_url)
        server.listening = time.perf_counter() - began
        with server.page() as page:
            while not page.health().get("ready"):
                for process in filter(None, (model, web)):
                    if process.poll() is not None or time.perf_counter() - began > READY_S:
                        raise ServerError(f"The server does not get ready: {_last_words(log)}")
                time.sleep(0.05)
        server.ready = time.perf_counter() - began
        yield server


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own commands
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _first_line(process: subprocess.Popen[str], log: Path) -> str:
    if process.stdout is None:
        raise ServerError(_last_words(log))
    return process.stdout.readline()


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing."


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _size(image: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(image) as opened:
        return opened.size
