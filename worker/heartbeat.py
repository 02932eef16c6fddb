"""The sign of life of a worker process: that it lives, which job it carries, what became of the jobs before."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.contract import JOBS_KEY, WORKER_KEY, WORKERS_KEY

log = logging.getLogger(__name__)

#: A sign of life every BEAT_S; without one the worker counts as dead after ALIVE_MS.
BEAT_S = 0.3
ALIVE_MS = 1200
#: How old what the worker says of itself may be, seconds.
FACTS_S = 2.0
#: A job that is this late, seconds, no longer hears the signal that ends it; nothing but a new process helps.
HUNG_S = 15.0
HUNG_STATUS = 70


class Heartbeat:
    """Says from a thread of its own that this process lives, even while a job keeps the main thread busy."""

    def __init__(self, redis_url: str, name: str, queues: Sequence[str]) -> None:
        self._redis = redis.Redis.from_url(
            redis_url, socket_connect_timeout=1.0, socket_timeout=1.0, retry=Retry(NoBackoff(), 1)
        )
        self._name = name
        self._queues = list(queues)
        self._state = "starting"
        self._reason: str | None = None
        self._limit_s: float | None = None
        self._job: str | None = None
        self._paused: tuple[str, ...] = ()
        self._facts: Callable[[], dict[str, Any]] = dict
        self._known: tuple[float, dict[str, Any]] = (-FACTS_S, {})
        self._outcomes: deque[tuple[str, str, str, float]] = deque(maxlen=1000)
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="bald-sam-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ready(self) -> None:
        self._state, self._reason = "ready", None
        self._beat()

    def failed(self, reason: str) -> None:
        """The worker lives and takes no jobs, and this sentence says why."""
        self._state, self._reason = "failed", reason

    def knows(self, facts: Callable[[], dict[str, Any]]) -> None:
        """From now on say also what `facts()` returns: versions, device, caches; see `worker.facts`."""
        self._facts, self._known = facts, (time.monotonic(), facts())

    def count(self, queue: str, outcome: str, said: str) -> None:
        """Say with the next sign of life what became of a job; see `contract.JOBS_KEY`."""
        with self._lock:
            self._outcomes.append((queue, outcome, said, time.time()))

    def carry(self, job_id: str | None, limit_s: float | None = None) -> None:
        """Say at once, not with the next beat, which job is carried now. `limit_s`: when its time is up, if ever."""
        self._job, self._since, self._limit_s = job_id, time.monotonic(), limit_s
        self._beat()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """In this block other jobs are carried; the one that is carried now is `paused` meanwhile."""
        kept = self._job, self._since, self._limit_s, self._paused
        if self._job is not None:
            self._paused = (*self._paused, self._job)
        try:
            yield
        finally:
            self._job, self._since, self._limit_s, self._paused = kept
            self._beat()

    def stop(self) -> None:
        """The worker leaves: let nobody wait for its key to expire."""
        self._stop.set()
        self._thread.join(5)
        try:
            self._redis.delete(WORKER_KEY + self._name)
            self._redis.srem(WORKERS_KEY, self._name)
        except redis.RedisError:
            log.debug("Redis is away: the worker's key expires by itself")
        self._redis.close()

    def _beat(self) -> None:
        with self._lock:
            age = time.monotonic() - self._since
            value = {
                "queues": self._queues,
                "state": self._state,
                "job": self._job,
                "paused": self._paused,
                "age_s": round(age, 3) if self._job else None,
                "reason": self._reason,
                "facts": self._known[1],
            }
            try:
                with self._redis.pipeline(transaction=False) as pipe:
                    pipe.set(WORKER_KEY + self._name, json.dumps(value), px=ALIVE_MS)
                    pipe.sadd(WORKERS_KEY, self._name)
                    for queue, outcome, said, when in self._outcomes:
                        pipe.hincrby(JOBS_KEY + queue, outcome)
                        pipe.hset(JOBS_KEY + queue, mapping={f"last_{outcome}": when, f"said_{outcome}": said})
                    pipe.execute()
                self._outcomes.clear()
            except redis.RedisError as error:
                log.debug("no sign of life: %s", type(error).__name__)

    def _run(self) -> None:
        while True:
            if time.monotonic() - self._known[0] >= FACTS_S:
                self._known = time.monotonic(), self._facts()
            self._beat()
            if self._stop.wait(BEAT_S):
                return
            job, limit_s, age_s = self._job, self._limit_s, time.monotonic() - self._since
            if job is not None and limit_s is not None and age_s > limit_s + HUNG_S:
                log.critical("job %s hangs since %.0f s; this process ends, to be started anew", job, age_s)
                logging.shutdown()
                os._exit(HUNG_STATUS)
