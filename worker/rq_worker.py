"""A worker process: keeps the model loaded and takes jobs from Redis, one at a time.

A thread tells Redis every fraction of a second that the process lives, and which job it carries
(`worker.heartbeat`); see `ml_backend.rq_runner` for who reads that.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import SimpleWorker
from rq.exceptions import DequeueTimeout, NoSuchJobError, StopRequested
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException
from rq.worker import WorkerStatus

from worker.contract import JOB_FUNCTIONS, NotQuickError, Queue, RuntimeOptions
from worker.heartbeat import Heartbeat
from worker.preemption import letting_through
from worker.rq_job import ModelJob

log = logging.getLogger(__name__)
_ids: ContextVar[Mapping[str, str]] = ContextVar("ids", default=MappingProxyType({}))

#: RQ's own bookkeeping, seconds: how long its record of a worker lives, and how often it looks for lost jobs.
WORKER_TTL_S = 30
MAINTENANCE_S = 30
RQ_BEAT_S = 5.0
#: A worker without work notices SIGTERM after this time at most, seconds.
DEQUEUE_S = 1
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 2.0
#: A model that cannot be loaded is tried again after this time, seconds: what is wrong may be mended meanwhile.
LOAD_AGAIN_S = 5.0
#: Long work, in the middle of which the worker does what comes into the other queues.
LONG = frozenset({Queue.BATCH, Queue.TRAIN})
#: Clicks that wait, of which those are looked for that need no encode.
MOST_LOOKED_AT = 32


class ModelWorker(SimpleWorker):
    """RQ worker in one process, which runs nothing but functions of the allow-list and says what it carries."""

    job_class = ModelJob
    log_result_lifespan = False

    def __init__(self, *args: Any, functions: Iterable[str], heartbeat: Heartbeat, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._functions = frozenset(functions)
        self._heartbeat = heartbeat
        self.stop_requested = False
        self._next_rq_beat = 0.0
        self._not_quick: set[str] = set()

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ's own sign of life is three commands before and after each job: now and then is enough of them."""
        if timeout is None and pipeline is None:
            if time.monotonic() < self._next_rq_beat:
                return
            self._next_rq_beat = time.monotonic() + RQ_BEAT_S
        super().heartbeat(timeout, pipeline)

    def subscribe(self) -> None:
        """No commands over Redis: whoever can write there need not be able to stop workers."""

    def unsubscribe(self) -> None:
        """Nothing was subscribed."""

    def request_stop(self, signum: Any, frame: Any) -> None:
        self.stop_requested = True
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]

    def _shutdown(self) -> None:
        """Only a note: RQ would raise out of whatever runs now, and lose a job between its queue and its start."""
        self._stop_requested = True

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        """Next (job, queue); None when there is none and `timeout` is. Raises StopRequested when it is time to go, or
        when Redis is away: `work` then begins anew."""
        self.set_state(WorkerStatus.IDLE)
        while not self._stop_requested:
            self.heartbeat()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()  # type: ignore[no-untyped-call]
            try:
                found = self.queue_class.dequeue_any(
                    self._ordered_queues,
                    timeout and DEQUEUE_S,
                    connection=self.connection,
                    job_class=self.job_class,
                    serializer=self.serializer,
                    death_penalty_class=self.death_penalty_class,
                )
            except DequeueTimeout:
                continue
            except (redis.ConnectionError, redis.TimeoutError) as error:
                raise StopRequested from error
            if found is not None:
                version = self.get_redis_server_version()  # type: ignore[no-untyped-call]
                found[0].redis_server_version = version
            return found
        raise StopRequested

    def execute_job(self, job: Any, queue: Any) -> None:
        self._heartbeat.carry(job.id, job.timeout if job.timeout and job.timeout > 0 else None)
        try:
            super().execute_job(job, queue)
        finally:
            self._heartbeat.count(queue.name, *job.outcome)
            self._heartbeat.carry(None)

    def perform_job(self, job: Any, queue: Any, execution: Any) -> bool:
        """Run the job, if it is one of ours. Nothing that it names is imported before that is known."""
        reason = self._refusal(job)
        _ids.set({"job": job.id} if reason is not None else _ids_of(job))
        if reason is None:
            self._not_quick.discard(job.id)
            long = job.origin in LONG
            with letting_through(self._do_what_is_urgent if long else self._answer_quick_clicks, quick=not long):
                done: bool = super().perform_job(job, queue, execution)
                return done
        log.error("job %s refused: %s", job.id, reason)
        job.ended_at = job.created_at
        self.handle_job_failure(
            job=job,
            queue=queue,
            started_job_registry=queue.started_job_registry,
            exc_string=f"refused: {reason}",
            execution=execution,
        )
        return False

    def _do_what_is_urgent(self) -> None:
        """In the middle of a long job: answer the clicks that wait, and encode the images of tasks that were opened."""
        urgent = [queue for queue in self._ordered_queues if queue.name not in LONG]
        try:
            while urgent:
                found = self.queue_class.dequeue_any(
                    urgent,
                    None,
                    connection=self.connection,
                    job_class=self.job_class,
                    serializer=self.serializer,
                    death_penalty_class=self.death_penalty_class,
                )
                if found is None:
                    return
                version = self.get_redis_server_version()  # type: ignore[no-untyped-call]
                found[0].redis_server_version = version
                with self._heartbeat.set_aside(), _alarm_set_aside():
                    self.execute_job(*found)
                self.set_state(WorkerStatus.BUSY)
        except redis.RedisError as error:
            log.debug("nothing is let through: %s", type(error).__name__)

    def _answer_quick_clicks(self) -> None:
        """While something is encoded for a click, or ahead: answer the clicks that wait and need no encode. Others go
        back to their places in the queue, and are answered in turn."""
        clicks = next((queue for queue in self._ordered_queues if queue.name == Queue.INTERACTIVE), None)
        try:
            while clicks is not None:
                waiting = clicks.get_job_ids(0, MOST_LOOKED_AT)
                self._not_quick.intersection_update(waiting)
                place = next((at for at, one in enumerate(waiting) if one not in self._not_quick), None)
                if place is None:
                    return
                if not self.connection.lrem(clicks.key, 1, waiting[place]):
                    continue  # another worker has it, or nobody wants it any more
                with self._heartbeat.set_aside(), _alarm_set_aside():
                    self._attempt(waiting[place], clicks, before=waiting[place - 1] if place else None)
                self.set_state(WorkerStatus.BUSY)
        except redis.RedisError as error:
            log.debug("nothing is let through: %s", type(error).__name__)

    def _attempt(self, job_id: str, queue: Any, before: str | None) -> None:
        """Do the job if it is quick, else put it back into the queue: behind `before`, if that is still there."""
        try:
            job: Any = self.job_class.fetch(job_id, connection=self.connection, serializer=self.serializer)
        except NoSuchJobError:
            return
        job.redis_server_version = self.get_redis_server_version()  # type: ignore[no-untyped-call]
        if self._refusal(job) is None:
            _ids.set(_ids_of(job))
            limit_s = job.timeout if job.timeout and job.timeout > 0 else None
            self._heartbeat.carry(job_id, limit_s)  # a click of a worker that dies now is not lost
            try:
                with self.death_penalty_class(limit_s or DEQUEUE_S, JobTimeoutException, job_id=job_id):
                    job.attempt()
            except NotQuickError:
                self._not_quick.add(job_id)
                if before is None or self.connection.linsert(queue.key, "AFTER", before, job_id) < 1:
                    queue.push_job_id(job_id, at_front=True)
                return
        self.execute_job(job, queue)

    def _refusal(self, job: Any) -> str | None:
        try:
            name, instance = job.func_name, job.instance
        except Exception as error:  # whatever the bytes are, they are not ours
            return f"its payload is not JSON ({type(error).__name__})"
        if instance is not None or not isinstance(name, str) or name not in self._functions:
            return f"{str(name)[:200]!r} is not a function that a worker may run"
        return None


def log_ids() -> Mapping[str, str]:
    """Ids of the job that this thread carries, for its log."""
    return _ids.get()


def _ids_of(job: Any) -> dict[str, str]:
    argument = job.args[0] if job.args else None
    found = {name: argument.get(name) for name in ("request", "session")} if isinstance(argument, dict) else {}
    return {"job": job.id, **{name: value for name, value in found.items() if isinstance(value, str)}}


@contextmanager
def _alarm_set_aside() -> Iterator[None]:
    """RQ ends a job that takes too long with SIGALRM, of which there is one: keep that of the job outside."""
    left, handler = signal.alarm(0), signal.getsignal(signal.SIGALRM)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.alarm(left)


def work(
    options: RuntimeOptions,
    queues: Sequence[str] | None = None,
    *,
    burst: bool = False,
    name: str | None = None,
    functions: Iterable[str] = JOB_FUNCTIONS,
) -> None:
    """Take jobs until SIGTERM or SIGINT (the running job is finished) or, with `burst`, until the queues are empty.

    Loads the model first. Waits for a Redis that is not up yet, and survives one that goes away. Main thread only.
    Raises ValueError without a Redis URL.
    """
    if options.redis_url is None:
        raise ValueError("A worker needs a Redis: set BALD_SAM_REDIS_URL or give --redis-url.")
    url = options.redis_url.get_secret_value()
    names = [str(queue) for queue in queues or Queue]
    # A name of its own for every start: RQ refuses one that a killed worker has left behind.
    unique = f"{name or socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    _wait_for(url)
    heartbeat = Heartbeat(url, unique, names)
    heartbeat.start()
    try:
        _load(options, heartbeat)
        log.info("worker %s takes jobs from %s", unique, ", ".join(names))
        for life in range(1, 1 << 31):
            worker = ModelWorker(
                names,
                name=f"{unique}-{life}",
                connection=redis.Redis.from_url(url),
                serializer=JSONSerializer,
                worker_ttl=WORKER_TTL_S,
                maintenance_interval=MAINTENANCE_S,
                log_job_description=False,  # it would hold image URLs with their signatures
                functions=functions,
                heartbeat=heartbeat,
            )
            try:
                worker.work(burst=burst, logging_level="WARNING")
            except redis.RedisError as error:
                log.warning("Redis went away (%s)", type(error).__name__)
            except StopRequested:  # a signal between two lives
                return
            if burst or worker.stop_requested:
                return
            time.sleep(FIRST_WAIT_S)
            _wait_for(url)
    finally:
        heartbeat.stop()


def _load(options: RuntimeOptions, heartbeat: Heartbeat) -> None:
    """Load the model. As long as it cannot be loaded the worker says why, takes no jobs, and tries again."""
    runtime = importlib.import_module("worker.runtime")
    runtime.configure(options)
    while True:
        try:
            runtime.warm_up()
        except (OSError, ValueError, RuntimeError) as error:
            if type(error).__name__ == "AcceleratorError":  # CUDA answers nothing more in this process
                raise
            foreseen = isinstance(error, ValueError) or type(error).__name__ == "CheckpointError"
            log.error("the model cannot be loaded: %s; trying again", error, exc_info=None if foreseen else error)
            heartbeat.failed(str(error) if foreseen else f"{type(error).__name__}, see the worker's log.")
            time.sleep(LOAD_AGAIN_S)
        else:
            heartbeat.knows(importlib.import_module("worker.facts").facts)
            heartbeat.ready()
            return


def _wait_for(url: str) -> None:
    """Return when Redis answers. Says once that it does not."""
    wait = 0.0
    client = redis.Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
    with client:
        while True:
            try:
                client.ping()
            except redis.AuthenticationError:
                raise
            except redis.RedisError as error:
                if not wait:
                    log.warning("Redis does not answer (%s); trying again until it does", type(error).__name__)
                wait = min(LONGEST_WAIT_S, wait * 2 or FIRST_WAIT_S)
                time.sleep(wait)
            else:
                if wait:
                    log.warning("Redis answers again")
                return
