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
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import SimpleWorker
from rq.exceptions import DequeueTimeout, StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import WorkerStatus

from worker.contract import JOB_FUNCTIONS, LARGE_MASK, MASK_KEY, Queue, RuntimeOptions, outcome_of
from worker.heartbeat import Heartbeat
from worker.preemption import letting_through

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


class ModelJob(Job):
    """An RQ job without what else Redis may name in one: functions to call when it ends or is found lost by whoever
    cleans up, and addresses to post to. Ours have neither."""

    success_callback = failure_callback = stopped_callback = None

    #: What became of it, and the words for that; see `contract.JOBS_KEY`.
    outcome = ("failed", "the function is none that a worker may run")

    def send_webhooks(self, *_: Any, **__: Any) -> None:
        """Nothing is sent."""

    def perform(self) -> Any:
        try:
            answer = super().perform()
        except BaseException as error:
            # Its words may hold anything; they are in the log.
            self.outcome = ("failed", f"{type(error).__name__}; the worker's log has {self.id}.")
            raise
        self.outcome = outcome_of(answer)
        return self._with_mask_beside(answer)

    def _with_mask_beside(self, answer: Any) -> Any:
        """The answer; a large mask of it is put into Redis by itself, see `contract.MASK_KEY`."""
        rle = answer.get("rle") if isinstance(answer, dict) else None
        if not isinstance(rle, str) or len(rle) <= LARGE_MASK or not self.result_ttl:
            return answer
        try:
            self.connection.set(MASK_KEY + self.id, rle, ex=self.result_ttl)
        except redis.RedisError:
            return answer
        return {**answer, "rle": None}


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
            with letting_through(self._do_what_is_urgent) if job.origin in LONG else nullcontext():
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
