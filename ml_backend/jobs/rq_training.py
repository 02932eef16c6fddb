"""One training done by a `bald-sam worker` through Redis, and watched: what a dead worker carried is enqueued again.

Whoever asked may go: the worker itself keeps the head and lets the project use it, the answer only tells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import redis
from rq import Queue as RqQueue
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer

from ml_backend.jobs.answers import to_train_result
from ml_backend.jobs.failures import JobFailed, worker_failed
from ml_backend.jobs.rq_results import read_results, reason, restore, result_key
from worker import contract
from worker.contract import PROGRESS_KEY, WORKER_KEY, WORKERS_KEY, Queue, TrainJob, TrainResult

log = logging.getLogger(__name__)

#: How often the job is looked after, seconds. Its answer comes at once.
LOOK_EVERY_S = 0.5
#: How long nobody may carry the job before that is believed, seconds.
LOST_S = 1.5
ATTEMPTS = 3
#: How long Redis may be away, seconds. A worker may be away as long as it likes: the job waits in the queue.
PATIENCE_S = 600.0
JOB_TIMEOUT_S = 6 * 3600
RESULT_TTL_S = 24 * 3600

Progress = Callable[[str, int, int], None]


class RqTraining:
    """One job on the queue `train`."""

    def __init__(self, connection: redis.Redis, job: TrainJob) -> None:
        self._redis = connection
        self._project = job.project
        self._payload = job.model_dump(mode="json")
        digest = hashlib.sha256(json.dumps(self._payload, sort_keys=True).encode()).hexdigest()
        self._name = f"train-{job.project}-{digest[:16]}"
        self._queue = RqQueue(str(Queue.TRAIN), connection=connection, serializer=JSONSerializer)
        self._attempts: list[str] = []

    def run(self, progress: Progress | None = None) -> TrainResult:
        """Enqueue the job, or find it under way already, and wait for its result.

        `progress(stage, done, total)`: with the stage `waiting` and the number of workers while none has begun.
        Raises JobFailed, and RedisError if Redis cannot be reached at the start.
        """
        waiting = [_text(one) for one in self._redis.lrange(self._queue.key, 0, -1)]
        same = next((one for one in [*waiting, *_carried(self._workers())] if one.startswith(self._name)), None)
        if same is None:
            self._enqueue()
        else:
            self._attempts.append(same)
        away_since = lost_since = None
        while True:
            try:
                result = self._read()
                if result is not None and not self._is_given_up(result):
                    return self._answer(result)
                now, away_since = time.monotonic(), None
                workers = self._workers()
                queued = self._redis.lpos(self._queue.key, self._attempts[-1]) is not None
                lost_since = None if queued or self._attempts[-1] in _carried(workers) else lost_since or now
                if lost_since is not None and now - lost_since > LOST_S:
                    self._once_more()
                    lost_since = None
                if progress is not None:
                    self._tell(progress, len(workers) if queued else None)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                away_since, lost_since = away_since or time.monotonic(), None
                if time.monotonic() - away_since > PATIENCE_S:
                    raise JobFailed(
                        "Redis cannot be reached.", "Check that it runs where BALD_SAM_REDIS_URL says.", 503
                    ) from error
                time.sleep(LOOK_EVERY_S)

    def _enqueue(self) -> None:
        job_id = f"{self._name}-{uuid.uuid4().hex[:8]}"
        self._queue.enqueue_call(
            contract.TRAIN,
            args=(self._payload,),
            job_id=job_id,
            description="train",
            timeout=JOB_TIMEOUT_S,
            result_ttl=RESULT_TTL_S,
            failure_ttl=RESULT_TTL_S,
        )
        self._attempts.append(job_id)

    def _read(self) -> Result | None:
        """The first result of any attempt, waited for until it is time to look after the job."""
        read = read_results(self._redis, self._attempts, int(LOOK_EVERY_S * 1000))
        return restore(self._redis, *read[0]) if read else None

    def _is_given_up(self, result: Result) -> bool:
        """Whether RQ's clean-up speaks, by the time of day of some machine. Who carries a job is known better here."""
        if result.type == Result.Type.SUCCESSFUL or "AbandonedJobError" not in (result.exc_string or ""):
            return False
        self._redis.delete(result_key(result.job_id))
        return True

    def _answer(self, result: Result) -> TrainResult:
        if result.type != Result.Type.SUCCESSFUL:
            raise worker_failed(reason(result))
        return to_train_result(result.return_value)

    def _once_more(self) -> None:
        if len(self._attempts) >= ATTEMPTS:
            raise JobFailed(
                f"The worker stopped while it was training, {ATTEMPTS} times.",
                "The reason is in the workers' logs (memory, most often).",
                503,
            )
        log.warning("training of project %d is lost: its worker is gone; once more", self._project)
        self._redis.delete(Job.key_for(self._attempts[-1]))
        self._enqueue()

    def _tell(self, progress: Progress, waiting_for: int | None) -> None:
        if waiting_for is not None:
            progress("waiting", waiting_for, 0)
            return
        held = self._redis.get(f"{PROGRESS_KEY}{self._project}")
        if isinstance(held, bytes):
            told = json.loads(held)
            progress(told["stage"], told["done"], told["total"])

    def _workers(self) -> list[dict[str, Any]]:
        """What living workers of the queue say of themselves."""
        members = self._redis.smembers(WORKERS_KEY)
        names = [_text(name) for name in members]
        beats = self._redis.mget([WORKER_KEY + name for name in names]) if names else []
        workers = [json.loads(beat) for beat in beats if beat is not None]
        return [worker for worker in workers if Queue.TRAIN in worker.get("queues", ())]


def _carried(workers: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the jobs that workers are at, or have put aside for a click."""
    return {one for worker in workers for one in (worker.get("job"), *worker.get("paused", ())) if one}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
