"""The images of a batch done by `bald-sam worker` processes through Redis, and all of them, whoever is killed.

A batch goes through the queue in small jobs, a few at a time. As with clicks, a job that is neither queued nor carried
by a living worker is enqueued again, at first in jobs of one image each: what kills its worker three times is alone
then, and is given up. Jobs are pure, so twice is harmless.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import redis
from rq import Queue as RqQueue
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from ml_backend.jobs.answers import to_answers
from ml_backend.jobs.failures import JobFailed
from ml_backend.jobs.rq_results import read_results, reason, restore, result_key
from ml_backend.jobs.runner import in_chunks
from worker import contract
from worker.contract import (
    WORKER_KEY,
    WORKERS_KEY,
    PrelabelFailure,
    PrelabelImage,
    PrelabelItem,
    PrelabelJob,
    PrelabelOptions,
    Queue,
)

log = logging.getLogger(__name__)

#: Jobs that wait in the queue beside those that workers carry: the next one is there when one is done.
QUEUED_AHEAD = 2
#: How often jobs are looked after, seconds. An answer comes at once.
LOOK_EVERY_S = 0.5
#: How long nobody may carry a job before that is believed, seconds.
LOST_S = 1.5
#: What stops so many workers is not given to another.
ATTEMPTS = 3
#: How long a batch waits for a worker, or for Redis, that is away, seconds.
PATIENCE_S = 120.0
#: Jobs and answers that nobody fetches go after this time, seconds.
KEPT_S = 900
JOB_TIMEOUT_S = 3600


@dataclass
class _Flight:
    """A job under way: its images, which attempt it is, and since when nobody has it."""

    items: tuple[PrelabelItem, ...]
    attempt: int
    lost_since: float | None = None


class RqBatch:
    """One batch. `run` may be left at any time: what still waits in the queue is taken out."""

    def __init__(self, connection: redis.Redis, options: PrelabelOptions) -> None:
        self._redis = connection
        self._options = options
        self._queue = RqQueue(str(Queue.BATCH), connection=connection, serializer=JSONSerializer)
        self._flights: dict[str, _Flight] = {}
        self._again: deque[tuple[tuple[PrelabelItem, ...], int]] = deque()
        self._workers = 1
        self._looked = 0.0
        self._away_since: float | None = None
        self._reason: str | None = None

    def run(self, items: Iterable[PrelabelItem]) -> Iterator[PrelabelImage | PrelabelFailure]:
        """See `Runner.prelabel`."""
        chunks = in_chunks(items)
        more = True
        try:
            while True:
                try:
                    while more and len(self._flights) + len(self._again) < self._workers + QUEUED_AHEAD:
                        chunk = next(chunks, None)
                        more = chunk is not None
                        if chunk is not None:
                            self._again.append((chunk, 1))
                    while self._again:
                        self._enqueue(*self._again[0])
                        self._again.popleft()
                    if not self._flights:
                        return
                    for job_id, result in self._read():
                        yield from self._answers(self._flights.pop(job_id), result)
                    yield from self._look_after()
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    self._wait_for_redis(error)
        finally:
            self._leave()

    def _enqueue(self, items: tuple[PrelabelItem, ...], attempt: int) -> None:
        job_id = f"prelabel-{uuid.uuid4().hex}"
        self._queue.enqueue_call(
            contract.PRELABEL,
            args=(PrelabelJob(items=items, options=self._options).model_dump(mode="json"),),
            job_id=job_id,
            description="prelabel",
            timeout=JOB_TIMEOUT_S,
            ttl=KEPT_S,
            result_ttl=KEPT_S,
            failure_ttl=KEPT_S,
            at_front=attempt > 1,
        )
        self._flights[job_id] = _Flight(items, attempt)

    def _read(self) -> list[tuple[str, Result]]:
        """Results that are there, waited for until it is time to look after the jobs."""
        read = read_results(self._redis, self._flights, int(LOOK_EVERY_S * 1000))
        self._away_since = None if read else self._away_since
        for job_id, _ in read:
            self._redis.delete(result_key(job_id), Job.key_for(job_id))
        return [(job_id, restore(self._redis, job_id, fields)) for job_id, fields in read]

    def _answers(self, flight: _Flight, result: Result) -> Iterator[PrelabelImage | PrelabelFailure]:
        if result.type == Result.Type.SUCCESSFUL:
            yield from to_answers(result.return_value)
            return
        log.error("a job of %d images failed: %s", len(flight.items), reason(result))
        yield from self._once_more(flight, "The worker failed on this image.", "The reason is in the worker's log.")

    def _look_after(self) -> Iterator[PrelabelFailure]:
        """Find the jobs that nobody has any more."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        alive = self._alive()
        self._workers = max(1, len(alive))
        self._wait_for_workers(alive, now)
        carried = {one for worker in alive for one in (worker.get("job"), *worker.get("paused", ()))}
        waiting = {_text(one) for one in self._redis.lrange(self._queue.key, 0, -1)}
        for job_id, flight in list(self._flights.items()):
            if job_id in carried or job_id in waiting:
                flight.lost_since = None
            elif flight.lost_since is None:
                flight.lost_since = now
            elif now - flight.lost_since > LOST_S and not self._redis.exists(result_key(job_id)):
                log.warning("a job of %d images is lost: its worker is gone; once more", len(flight.items))
                del self._flights[job_id]
                yield from self._once_more(
                    flight,
                    f"The worker stopped while it worked on this image, {ATTEMPTS} times.",
                    "The reason is in the workers' logs (memory, most often).",
                )

    def _once_more(self, flight: _Flight, error: str, hint: str) -> Iterator[PrelabelFailure]:
        if flight.attempt >= ATTEMPTS:
            yield from (PrelabelFailure(key=item.key, error=error, hint=hint) for item in flight.items)
        else:
            self._again += [((item,), flight.attempt + 1) for item in flight.items]

    def _alive(self) -> list[dict[str, Any]]:
        """What living workers of the batch queue say of themselves."""
        names = [_text(name) for name in self._redis.smembers(WORKERS_KEY)]
        beats = self._redis.mget([WORKER_KEY + name for name in names]) if names else []
        workers = [json.loads(beat) for beat in beats if beat is not None]
        return [worker for worker in workers if Queue.BATCH in worker.get("queues", ())]

    def _wait_for_workers(self, alive: list[dict[str, Any]], now: float) -> None:
        able = [worker for worker in alive if worker.get("state") != "failed"]
        self._away_since = None if able else self._away_since or now
        if self._away_since is not None and now - self._away_since > PATIENCE_S:
            reason = next((why for worker in alive if (why := worker.get("reason"))), None)
            if reason is not None:
                raise JobFailed(f"No worker can do the batch: {reason}", "Mend that, and start the batch again.", 503)
            raise JobFailed(
                "No worker takes jobs of the batch queue.",
                "Start one with `bald-sam worker`, and the batch again.",
                503,
            )

    def _wait_for_redis(self, error: Exception) -> None:
        now = time.monotonic()
        self._away_since = self._away_since or now
        for flight in self._flights.values():
            flight.lost_since = None
        if now - self._away_since > PATIENCE_S:
            raise JobFailed(
                "Redis cannot be reached.", "Check that it runs where BALD_SAM_REDIS_URL says.", 503
            ) from error
        time.sleep(LOOK_EVERY_S)

    def _leave(self) -> None:
        """Take what nobody will fetch out of the queue."""
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in self._flights:
                    pipe.lrem(self._queue.key, 0, job_id)
                pipe.execute()
        except redis.RedisError as error:
            log.debug("jobs are left in the queue: %s", type(error).__name__)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
