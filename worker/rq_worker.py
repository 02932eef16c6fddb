"""How a worker takes jobs from Redis: one at a time, but for what goes before, in the middle of a job."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

import redis
from rq import SimpleWorker
from rq.exceptions import DequeueTimeout, NoSuchJobError, StopRequested
from rq.timeouts import JobTimeoutException
from rq.worker import WorkerStatus

from worker.contract import NotQuickError, Queue
from worker.heartbeat import Heartbeat
from worker.preemption import letting_through
from worker.rq_job import ModelJob

log = logging.getLogger(__name__)
_ids: ContextVar[Mapping[str, str]] = ContextVar("ids", default=MappingProxyType({}))

#: RQ's own sign of life, seconds.
RQ_BEAT_S = 5.0
#: A worker without work notices SIGTERM after this time at most, seconds.
DEQUEUE_S = 1
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
                return self._next_of(self._ordered_queues, timeout and DEQUEUE_S)
            except DequeueTimeout:
                continue
            except (redis.ConnectionError, redis.TimeoutError) as error:
                raise StopRequested from error
        raise StopRequested

    def _next_of(self, queues: Any, timeout: int | None) -> Any:
        """Next (job, queue) of these queues, waited for as long as `timeout` says; None where it says nothing and there
        is none. Raises DequeueTimeout."""
        found = self.queue_class.dequeue_any(
            queues,
            timeout,
            connection=self.connection,
            job_class=self.job_class,
            serializer=self.serializer,
            death_penalty_class=self.death_penalty_class,
        )
        if found is not None:
            found[0].redis_server_version = self.get_redis_server_version()  # type: ignore[no-untyped-call]
        return found

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
            one = self._one_urgent if long else self._one_quick
            with letting_through(partial(self._let_through, one), quick=not long):
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

    def _let_through(self, one: Callable[[], bool]) -> None:
        """In the middle of a job: call `one`, which does one job of others, until there is none for it."""
        try:
            while one():
                self.set_state(WorkerStatus.BUSY)
        except redis.RedisError as error:
            log.debug("nothing is let through: %s", type(error).__name__)

    def _one_urgent(self) -> bool:
        """In the middle of a long job: answer a click that waits, or encode the image of a task that was opened."""
        urgent = [queue for queue in self._ordered_queues if queue.name not in LONG]
        found = self._next_of(urgent, None) if urgent else None
        if found is None:
            return False
        with self._heartbeat.set_aside(), _alarm_set_aside():
            self.execute_job(*found)
        return True

    def _one_quick(self) -> bool:
        """While something is encoded for a click, or ahead: answer a click that waits and needs no encode. Another goes
        back to its place in the queue, and is answered in turn."""
        clicks = next((queue for queue in self._ordered_queues if queue.name == Queue.INTERACTIVE), None)
        waiting = [] if clicks is None else clicks.get_job_ids(0, MOST_LOOKED_AT)
        self._not_quick.intersection_update(waiting)
        place = next((at for at, one in enumerate(waiting) if one not in self._not_quick), None)
        if clicks is None or place is None:
            return False
        if self.connection.lrem(clicks.key, 1, waiting[place]):  # else another worker has it, or nobody wants it now
            with self._heartbeat.set_aside(), _alarm_set_aside():
                self._attempt(waiting[place], clicks, before=waiting[place - 1] if place else None)
        return True

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
