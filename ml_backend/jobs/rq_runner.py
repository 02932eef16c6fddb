"""Clicks answered by `bald-sam worker` processes through Redis.

RQ notices a dead worker after a minute or more, an annotator after a second. So each worker keeps a key in Redis that
expires shortly after its last sign of life and names the job it carries, and the request that waits looks at it: a job
that is neither queued nor carried by a living worker is enqueued again. Job functions are pure, so twice is harmless.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue as RqQueue
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import utcparse

from ml_backend.jobs.answers import to_result
from ml_backend.jobs.failures import JobFailed, superseded, too_late, too_many, worker_failed
from ml_backend.jobs.job_counts import described
from ml_backend.jobs.rq_batch import RqBatch
from ml_backend.jobs.rq_results import Fields, read_results, reason, restore, result_key, with_mask
from ml_backend.jobs.rq_training import RqTraining
from ml_backend.jobs.runner import MAX_EMBED_WAITING, image_key
from worker import contract
from worker.contract import (
    JOBS_KEY,
    WORKER_KEY,
    WORKERS_KEY,
    EmbedJob,
    PrelabelFailure,
    PrelabelImage,
    PrelabelItem,
    PrelabelOptions,
    Queue,
    SegmentJob,
    SegmentResult,
    TrainJob,
    TrainResult,
)

log = logging.getLogger(__name__)

SESSION_KEY = "bald-sam:session:"
EMBED_KEY = "bald-sam:embed:"
PROBE_KEY = "bald-sam:probe"

#: A waiting request looks after its job this often, seconds. An answer wakes it at once.
POLL_S = 0.1
#: How long nobody may carry a job, or be alive, before that is believed. A worker needs milliseconds to say so.
LOST_S = 0.5
#: How long Redis may be away during a click.
OUTAGE_S = 3.0
#: A job is tried this often: what kills three workers is not given to a fourth.
ATTEMPTS = 3
#: How long answers stay in Redis, seconds. Somebody is waiting for them, or nobody ever will.
RESULT_TTL_S = 30
#: An image is put into the queue again after this time, seconds; if it is in the cache by then, it costs nothing.
EMBED_AGAIN_S = 60
EMBED_TIMEOUT_S = 600


class _View(NamedTuple):
    """What Redis knows of a job: still `queued`, `carried` by a living worker, and is any worker `alive` to take it.

    `alive`: and ready. `reason`: why one that lives is not.
    """

    queued: bool
    carried: bool
    alive: bool
    reason: str | None


class RqRunner:
    """Enqueues on RQ queues with the JSON serializer and waits for the result."""

    def __init__(self, redis_url: str, *, max_waiting: int = 64) -> None:
        # Failing at once is better than failing late: the loop that waits does the retrying.
        self._redis = redis.Redis.from_url(
            redis_url, socket_connect_timeout=1.0, socket_timeout=5.0, retry=Retry(NoBackoff(), 1)
        )
        self._max_waiting = max_waiting
        self._queues = {name: RqQueue(str(name), connection=self._redis, serializer=JSONSerializer) for name in Queue}

    def segment(self, job: SegmentJob, *, deadline_s: float) -> SegmentResult:
        try:
            return self._segment(job, deadline_s)
        except redis.RedisError as error:
            raise _redis_failed(error) from error

    def embed(self, job: EmbedJob) -> None:
        rq_queue = self._queues[Queue.EMBED]
        try:
            if self._redis.llen(rq_queue.key) + len(job.images) > MAX_EMBED_WAITING:
                log.info("too many images wait to be encoded; %d more are left for their first click", len(job.images))
                return
            for image in job.images:
                name = image_key(image)
                if not self._redis.set(EMBED_KEY + name, 1, nx=True, ex=EMBED_AGAIN_S):
                    continue
                rq_queue.enqueue_call(
                    contract.EMBED,
                    args=(EmbedJob(images=(image,)).model_dump(mode="json"),),
                    job_id=f"embed-{name}-{uuid.uuid4().hex[:8]}",
                    description="embed",
                    timeout=EMBED_TIMEOUT_S,
                    ttl=EMBED_TIMEOUT_S,
                    result_ttl=0,
                    failure_ttl=RESULT_TTL_S,
                )
        except redis.RedisError as error:
            log.warning("images are not encoded ahead: Redis: %s", type(error).__name__)

    def prelabel(
        self, items: Iterable[PrelabelItem], options: PrelabelOptions
    ) -> Iterator[PrelabelImage | PrelabelFailure]:
        try:
            yield from RqBatch(self._redis, options).run(items)
        except redis.RedisError as error:
            raise _redis_failed(error) from error

    def train(self, job: TrainJob, progress: Callable[[str, int, int], None] | None = None) -> TrainResult:
        try:
            return RqTraining(self._redis, job).run(progress)
        except redis.RedisError as error:
            raise _redis_failed(error) from error

    def status(self) -> dict[str, Any]:
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for name in Queue:
                    pipe.llen(self._queues[name].key)
                    pipe.lindex(self._queues[name].key, 0)
                    pipe.hgetall(JOBS_KEY + name)
                found = pipe.execute()
            lengths, first, counts = found[::3], found[1::3], found[2::3]
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in first:
                    pipe.hget(Job.key_for(_text(job_id or "none")), "created_at")
                waiting_since = pipe.execute()
            workers = self._workers()
        except redis.RedisError as error:
            said = _redis_failed(error).error
            return {"runner": "rq", "error": said, "queues": {}, "workers": [], "running": [], "jobs": {}}
        running = [
            {"job": worker["job"], "worker": name, "age_s": worker.get("age_s")}
            for name, worker in workers.items()
            if worker.get("job")
        ]
        return {
            "runner": "rq",
            "queues": {str(name): length for name, length in zip(Queue, lengths, strict=True)},
            "workers": [{"name": name, **worker} for name, worker in workers.items()],
            "running": running,
            "jobs": {
                str(name): {"oldest_s": _age_s(since)}
                | described({_text(key): _text(value) for key, value in ended.items()})
                for name, since, ended in zip(Queue, waiting_since, counts, strict=True)
            },
        }

    def close(self) -> None:
        self._redis.close()

    def _segment(self, job: SegmentJob, deadline_s: float) -> SegmentResult:
        deadline = time.monotonic() + deadline_s
        if self._redis.llen(self._queues[Queue.INTERACTIVE].key) >= self._max_waiting:
            raise too_many()
        payload = job.model_dump(mode="json")
        session = hashlib.sha256(job.session.encode()).hexdigest()[:16]
        content = hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:12]
        base = f"segment-{session}-{content}-{uuid.uuid4().hex[:8]}"
        attempts = [self._enqueue(f"{base}-1", payload, session, deadline_s)]
        lost_since = nobody_since = outage_since = None
        while True:
            now = time.monotonic()
            if now >= deadline:
                self._drop(attempts[-1])
                raise too_late(deadline_s)
            try:
                found = self._read(attempts, min(POLL_S, deadline - now))
                answer = self._answer(*found) if found is not None else None
                if answer is not None:
                    return answer
                view = self._view(attempts[-1])
                now, outage_since = time.monotonic(), None
                lost_since = None if view.queued or view.carried else lost_since or now
                nobody_since = None if view.alive or view.carried else nobody_since or now
                if nobody_since is not None and now - nobody_since > LOST_S:
                    self._drop(attempts[-1])
                    raise self._nobody(view.reason)
                if lost_since is not None and now - lost_since > LOST_S:
                    attempts.append(self._again(base, attempts, payload, session, deadline - now))
                    lost_since = None
            except (redis.ConnectionError, redis.TimeoutError):
                now = time.monotonic()
                outage_since = outage_since or now
                lost_since = nobody_since = None
                if now - outage_since > OUTAGE_S:
                    raise
                time.sleep(POLL_S)

    def _nobody(self, reason: str | None) -> JobFailed:
        """Why no worker is there. Raises RedisError if Redis takes nothing: then none can say that it lives."""
        self._redis.set(PROBE_KEY, 1, ex=1)
        if reason is not None:
            return JobFailed(f"No worker can answer yet: {reason}", "Click again in a moment.", 503, 5)
        return JobFailed("No worker is running.", "Start one with `bald-sam worker`.", 503, 5)

    def _enqueue(
        self, job_id: str, payload: dict[str, Any], session: str, left_s: float, *, at_front: bool = False
    ) -> str:
        """Enqueue a click; clicks of the session that still wait are dropped, and their requests told."""
        rq_queue = self._queues[Queue.INTERACTIVE]
        seconds = math.ceil(left_s)
        with self._redis.pipeline() as pipe:
            rq_queue.enqueue_call(
                contract.SEGMENT,
                args=(payload,),
                job_id=job_id,
                description="segment",
                at_front=at_front,
                timeout=seconds,
                ttl=seconds,
                result_ttl=RESULT_TTL_S,
                failure_ttl=RESULT_TTL_S,
                pipeline=pipe,
            )
            pipe.set(SESSION_KEY + session, job_id, ex=seconds + RESULT_TTL_S, get=True)
            older = pipe.execute()[-1]
        older_id = _text(older) if isinstance(older, str | bytes) else None
        if older_id is not None and self._redis.lrem(rq_queue.key, 0, older_id):
            with self._redis.pipeline() as pipe:
                pipe.xadd(result_key(older_id), {"superseded": 1})
                pipe.expire(result_key(older_id), RESULT_TTL_S)
                pipe.delete(Job.key_for(older_id))
                pipe.execute()
        return job_id

    def _again(self, base: str, attempts: list[str], payload: dict[str, Any], session: str, left_s: float) -> str:
        """The job anew, for another worker. Its old record may go: no worker will come back to it."""
        latest = self._redis.get(SESSION_KEY + session)
        if latest is not None and _text(latest) != attempts[-1]:
            raise superseded()
        if len(attempts) >= ATTEMPTS:
            raise JobFailed(
                f"The worker stopped while it answered this click, {ATTEMPTS} times.",
                f"The reason is in the workers' logs (memory, most often); look for {attempts[-1]}.",
                503,
                5,
            )
        log.warning("job %s is lost: its worker is gone; enqueued again", attempts[-1])
        self._redis.expire(Job.key_for(attempts[-1]), RESULT_TTL_S)
        return self._enqueue(f"{base}-{len(attempts) + 1}", payload, session, left_s, at_front=True)

    def _read(self, job_ids: list[str], block_s: float) -> tuple[str, Fields] | None:
        """First result of any of the attempts: (job id, fields of the result)."""
        return next(iter(read_results(self._redis, job_ids, max(1, int(block_s * 1000)))), None)

    def _answer(self, job_id: str, fields: Fields) -> SegmentResult | None:
        """What the result says; None, and the result is dropped, if it is not a worker that speaks, but RQ's clean-up,
        or if Redis has lost the mask.

        RQ gives up jobs by the time of day, and a clock may be wrong. Who carries a job is known better here.
        """
        if b"superseded" in fields:
            raise superseded()
        result = restore(self._redis, job_id, fields)
        if result.type == Result.Type.SUCCESSFUL:
            answer = with_mask(self._redis, job_id, result.return_value)
            if answer is not None:
                return to_result(answer)
        elif "AbandonedJobError" not in (why := reason(result)):
            raise worker_failed(why, job_id)
        self._redis.delete(result_key(job_id))
        return None

    def _drop(self, job_id: str) -> None:
        """Take a job that nobody waits for any more out of the queue."""
        with self._redis.pipeline() as pipe:
            pipe.lrem(self._queues[Queue.INTERACTIVE].key, 0, job_id)
            pipe.expire(Job.key_for(job_id), RESULT_TTL_S)
            pipe.execute()

    def _view(self, job_id: str) -> _View:
        queued = self._redis.lpos(self._queues[Queue.INTERACTIVE].key, job_id) is not None
        workers = [worker for worker in self._workers().values() if Queue.INTERACTIVE in worker.get("queues", ())]
        carried = any(worker.get("job") == job_id for worker in workers)
        alive = any(worker.get("state") == "ready" for worker in workers)
        loading = "the model is still being loaded." if any(w.get("state") == "starting" for w in workers) else None
        return _View(queued, carried, alive, next((why for w in workers if (why := w.get("reason"))), loading))

    def _workers(self) -> dict[str, dict[str, Any]]:
        """Living workers by name, each with `queues`, `state`, `job`, `age_s`."""
        names = sorted(_text(name) for name in self._redis.smembers(WORKERS_KEY))
        if not names:
            return {}
        beats = self._redis.mget([WORKER_KEY + name for name in names])
        alive = {name: json.loads(beat) for name, beat in zip(names, beats, strict=True) if beat is not None}
        gone = [name for name in names if name not in alive]
        if gone:
            self._redis.srem(WORKERS_KEY, *gone)
        return alive


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _age_s(since: bytes | None) -> float | None:
    """Seconds since a time as RQ writes it."""
    if since is None:
        return None
    return round(max(0.0, (datetime.now(UTC) - utcparse(_text(since))).total_seconds()), 3)


def _redis_failed(error: redis.RedisError) -> JobFailed:
    log.error("Redis: %s", type(error).__name__)
    if isinstance(error, redis.OutOfMemoryError):
        return JobFailed("Redis is full.", "Raise its maxmemory, or set maxmemory-policy to volatile-lru.", 503, 5)
    if "MISCONF" in str(error):
        return JobFailed(
            "Redis cannot write to its disk.", "Free disk space on its machine; it goes on by itself then.", 503, 5
        )
    if isinstance(error, redis.AuthenticationError):
        return JobFailed("Redis refuses the password.", "Check the password in BALD_SAM_REDIS_URL.", 503, 5)
    return JobFailed("Redis cannot be reached.", "Check that it runs where BALD_SAM_REDIS_URL says.", 503, 2)
