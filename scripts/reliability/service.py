"""The whole service as processes that can be killed: Redis, `bald-sam serve`, `bald-sam worker`s under a supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import requests

from ml_backend import processes
from ml_backend.jobs.rq_runner import RqRunner

BALD_SAM = [sys.executable, "-m", "ml_backend.cli"]
#: A worker that ended is started again after this time, seconds, as `restart: always` would do.
RESTART_S = 0.2
#: Long enough to import PyTorch on a busy machine, seconds.
PATIENCE_S = 120.0


class RedisServer:
    """A Redis of one's own that can be killed and started again, empty. `options` go to its command line."""

    def __init__(self, folder: Path, *options: str) -> None:
        port = processes.free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        self._command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command += ["--save", "", "--appendonly", "no", *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        # Signals as they are here: a file that may not grow is an error to tell of, not a reason to die.
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, restore_signals=False)
        with redis.Redis.from_url(self.url) as client:
            wait_for(lambda: _answers(client))

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9; harmless when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Service:
    """`bald-sam serve` and `workers` supervised workers with `tiny`, or without workers everything in one process.

    `worker`: another command than `bald-sam worker`; the address of Redis is appended.
    """

    def __init__(
        self, folder: Path, *, workers: int, worker: Sequence[str | Path] | None = None, **environment: str
    ) -> None:
        self.folder = folder
        self.redis = RedisServer(folder)
        self.port = processes.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {"BALD_SAM_DATA_DIR": str(folder / "data"), "BALD_SAM_LOCAL_ROOTS": str(folder)}
        # One thread each: several workers share this machine's cores.
        own |= {"OMP_NUM_THREADS": "1", "BALD_SAM_REDIS_URL": self.redis.url if workers else ""}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALD_SAM_")}
        self._worker = [*worker, self.redis.url] if worker else [*BALD_SAM, "worker"]
        self._runner = RqRunner(self.redis.url)
        self._environment = inherited | own | environment
        self.workers: list[subprocess.Popen[bytes] | None] = [None] * workers
        self.starts = 0
        self._server: subprocess.Popen[bytes] | None = None
        self._stop, self._paused = threading.Event(), threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    def __enter__(self) -> Service:
        self.redis.start()
        self._server = self._run([*BALD_SAM, "serve", "--port", str(self.port)])
        self._supervisor.start()
        try:
            wait_for(self.ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._supervisor.join()
        for process in [*self.workers, self._server]:
            if process is not None:
                process.kill()
                process.wait()
        self._runner.close()
        self.redis.kill()

    def ready(self) -> bool:
        """Whether every worker (or the one process) has loaded its model."""
        try:
            if not requests.get(f"{self.url}/health", timeout=2).json()["ready"]:
                return False
        except requests.RequestException:
            return False
        status = self.status() if self.workers else {"workers": []}
        ready = {pid_of(worker["name"]) for worker in status["workers"] if worker["state"] == "ready"}
        alive = {worker.pid for worker in self.alive()}
        # For a second Redis still knows of one that was killed.
        return len(alive) == len(self.workers) and alive <= ready

    def status(self) -> dict[str, Any]:
        """What a web process knows of queues and workers."""
        return self._runner.status()

    def alive(self) -> list[subprocess.Popen[bytes]]:
        """The worker processes that run."""
        return [worker for worker in self.workers if worker is not None and worker.poll() is None]

    def kill(self, *pids: int) -> None:
        """kill -9 these workers, and wait until they are gone."""
        victims = [worker for worker in self.alive() if worker.pid in pids]
        for victim in victims:
            victim.kill()
        for victim in victims:
            victim.wait()

    @contextmanager
    def nobody_is_started_again(self) -> Iterator[None]:
        """In this block the supervisor does nothing."""
        self._paused.set()
        try:
            yield
        finally:
            self._paused.clear()

    @property
    def server_pid(self) -> int:
        """Process id of `bald-sam serve`."""
        assert self._server is not None
        return self._server.pid

    def server_is_the_same(self) -> bool:
        """Whether the web process has never ended."""
        return self._server is not None and self._server.poll() is None

    def log(self) -> str:
        """What all processes wrote."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def _run(self, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        self.starts += 1
        with (self.folder / f"process-{self.starts}.log").open("wb") as log:
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def _supervise(self) -> None:
        while not self._stop.wait(RESTART_S):
            for slot, process in enumerate(self.workers):
                if self._paused.is_set():
                    break
                if process is None or process.poll() is not None:
                    self.workers[slot] = self._run(self._worker)


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    """Return when the condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the service did not get there in time")
        time.sleep(0.05)


def pid_of(worker: str) -> int:
    """Process id in the name of a worker."""
    return int(worker.split("-")[-2])


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
