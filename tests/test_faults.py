"""What an annotator sees of a fault, and that it leaves nothing behind: rows of docs/reliability.md.

The service here is `bald-sam serve`, a Redis and a worker process, all real. It is the same for all tests of this file,
so each of them also shows that the fault of the test before has healed without a process being started again.
"""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from sqlalchemy import func, select

from ml_backend import processes
from ml_backend.app import create_app
from ml_backend.clicks.schema import answers, make_engine
from ml_backend.settings import Settings

ROOT = Path(__file__).parents[1]
QUEUE_WORKER = ROOT / "tests" / "ml_backend" / "jobs" / "queue_worker.py"


@pytest.fixture(scope="module")
def load() -> Any:
    """`scripts/reliability`: the service and its annotators."""
    sys.path.append(str(ROOT / "scripts"))
    return importlib.import_module("reliability.annotators")


@pytest.fixture(scope="module")
def pictures(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load.Pictures(tmp_path_factory.mktemp("pictures"), 2, (60, 80))


@pytest.fixture(scope="module")
def shared(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    service = importlib.import_module("reliability.service")
    folder = tmp_path_factory.mktemp("service")
    with service.Service(folder, workers=1, worker=[sys.executable, QUEUE_WORKER], PYTHONPATH=str(ROOT)) as running:
        yield running


@pytest.fixture
def service(shared: Any) -> Iterator[Any]:
    """The service, healthy; afterwards no other process than before, but for workers that the test killed."""
    until(shared.ready)
    server = shared.server_pid
    yield shared
    assert (shared.server_pid, shared.server_is_the_same()) == (server, True)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


_tasks = iter(range(1, 1_000_000))


def click(service: Any, pictures: Any, count: int = 1) -> requests.Response:
    """A click on a new object."""
    task = next(_tasks)
    answer: requests.Response = requests.post(
        f"{service.url}/predict", json=pictures.body(0, count, f"prompt-{task}", task), timeout=100
    )
    return answer


def words(answer: requests.Response, status: int, *parts: str) -> None:
    """A refusal in words, where Label Studio shows them: in the reason phrase."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["error"]
    assert body["hint"]
    for part in parts:
        assert part in answer.reason
    if status == 503:
        assert int(answer.headers["Retry-After"]) > 0


@contextmanager
def no_room(pid: int) -> Iterator[None]:
    """As long as this lasts the kernel lets no file of the process grow, which to the process is a full disk."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_no_worker_is_a_clear_503_and_the_next_click_works(service: Any, pictures: Any) -> None:
    assert click(service, pictures).ok
    with service.nobody_is_started_again():
        service.kill(*[worker.pid for worker in service.alive()])
        words(click(service, pictures), 503, "No worker is running.", "bald-sam worker")
        assert requests.get(f"{service.url}/health", timeout=5).json()["status"] == "UP"
    until(service.ready)
    assert click(service, pictures).ok


def test_dead_redis_is_a_clear_503_and_an_empty_one_is_enough(service: Any, pictures: Any) -> None:
    starts = service.starts
    service.redis.kill()
    words(click(service, pictures), 503, "Redis cannot be reached.", "BALD_SAM_REDIS_URL")
    service.redis.start()
    until(service.ready)
    assert click(service, pictures, 2).ok
    assert service.starts == starts, "a process was started again"


def test_full_redis_is_a_clear_503(service: Any, pictures: Any) -> None:
    with redis.Redis.from_url(service.redis.url) as client:
        client.config_set("maxmemory-policy", "volatile-lru")
        client.config_set("maxmemory", "1mb")  # less than it uses already
        try:
            words(click(service, pictures), 503, "Redis is full.", "maxmemory")
        finally:
            client.config_set("maxmemory", "0")
    until(service.ready)
    assert click(service, pictures).ok


def test_redis_full_of_embeddings_forgets_the_oldest(service: Any, pictures: Any) -> None:
    with redis.Redis.from_url(service.redis.url) as client:
        room = int(client.info("memory")["used_memory"]) + (24 << 20)
        client.config_set("maxmemory-policy", "volatile-lru")
        client.config_set("maxmemory", room)
        try:
            for number in range(60):
                client.set(f"bald-sam:embedding:{number}", bytes(1 << 20), ex=3600)
                if number % 6 == 5:
                    assert click(service, pictures).ok
            assert client.info("stats")["evicted_keys"] > 0
        finally:
            client.config_set("maxmemory", "0")
            client.delete(*client.keys("bald-sam:embedding:*"))


def test_redis_without_room_on_its_disk_is_a_clear_503(service: Any, pictures: Any) -> None:
    with redis.Redis.from_url(service.redis.url) as client:
        client.config_set("save", "3600 1")
        with no_room(service.redis.pid):
            client.bgsave()
            until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            words(click(service, pictures), 503, "Redis cannot write to its disk.")
        client.bgsave()
        until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")
        until(service.ready)
        assert click(service, pictures).ok
        client.config_set("save", "")


def test_a_full_disk_delays_the_click_log_and_loses_no_click(service: Any, pictures: Any) -> None:
    engine = make_engine(None, service.folder / "data")

    def logged() -> int:
        with engine.connect() as connection:
            return int(connection.scalar(select(func.count()).select_from(answers).where(answers.c.error.is_(None))))

    assert click(service, pictures).ok
    until(logged)
    time.sleep(1)  # what was answered before is written
    before = logged()
    with no_room(service.server_pid):
        for _ in range(10):
            assert click(service, pictures).ok
        time.sleep(1.5)
        assert logged() == before
    until(lambda: logged() == before + 10)
    engine.dispose()


def test_a_dead_or_slow_label_studio_is_told_and_heals(pictures: Any, tmp_path: Path) -> None:
    """In one process, with `tiny`."""
    images = importlib.import_module("http.server")
    port, picture = processes.free_port(), pictures.paths[0].read_bytes()
    slow = importlib.import_module("threading").Event()

    class LabelStudio(images.BaseHTTPRequestHandler):  # type: ignore[misc,name-defined]
        def do_GET(self) -> None:
            self.send_response(200 if "gone" not in self.path else 401)
            self.send_header("Content-Length", str(len(picture)))
            self.end_headers()
            for byte in range(0, len(picture), 64):
                self.wfile.write(picture[byte : byte + 64])
                if slow.is_set():
                    time.sleep(0.3)

        def log_message(self, *_: Any) -> None:
            pass

    settings = Settings(
        _env_file=None,
        data_dir=tmp_path,
        device="cpu",
        label_studio_url=f"http://127.0.0.1:{port}",
        label_studio_api_key="0" * 40,
        fetch_timeout_s=3,
        click_log=False,
        prefetch=0,
    )
    app = create_app(settings)
    client = app.test_client()

    def ask(name: str, session: str) -> Any:
        body = pictures.body(0, 1, session, 1)
        body["tasks"][0]["data"]["image"] = f"/data/upload/1/{name}.png"
        return client.post("/predict", json=body)

    dead = ask("a", "s")
    assert (dead.status_code, "LABEL_STUDIO_URL" in dead.json["hint"]) == (502, True)
    server = images.ThreadingHTTPServer(("127.0.0.1", port), LabelStudio)
    server.daemon_threads = True
    importlib.import_module("threading").Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert ask("a", "s").status_code == 200
        slow.set()
        late = ask("b", "s")
        assert (late.status_code, "took more than 3 s" in late.json["error"]) == (504, True)
        assert ask("a", "t").status_code == 200, "this picture is known: Label Studio is not asked"
        slow.clear()
        assert ask("b", "s").status_code == 200
        expired = ask("gone", "s")
        assert (expired.status_code, "LABEL_STUDIO_API_KEY" in expired.json["error"]) == (401, True)
        assert ask("b", "t").status_code == 200
    finally:
        server.shutdown()
        server.server_close()
        app.extensions["bald_sam_runner"].close()
