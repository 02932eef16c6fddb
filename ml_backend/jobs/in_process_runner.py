"""The runner for one machine: the job functions of the worker, on a thread of this process."""

from __future__ import annotations

import importlib
import itertools
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rq.timeouts import JobTimeoutException

from ml_backend import logs
from ml_backend.jobs.answers import to_answers, to_result, to_train_result
from ml_backend.jobs.cancel import Cancellable
from ml_backend.jobs.failures import JobFailed, superseded, too_late, too_many, worker_failed
from ml_backend.jobs.job_counts import JobCounts, described
from ml_backend.jobs.runner import MAX_EMBED_WAITING, image_key, in_chunks
from worker import contract
from worker.contract import (
    EmbedJob,
    NotQuickError,
    PrelabelFailure,
    PrelabelImage,
    PrelabelItem,
    PrelabelJob,
    PrelabelOptions,
    Queue,
    RuntimeOptions,
    SegmentJob,
    SegmentResult,
    TrainJob,
    TrainResult,
)

log = logging.getLogger(__name__)

_PRIORITY = {name: number for number, name in enumerate(Queue)}
_CLICK = _PRIORITY[Queue.INTERACTIVE]
#: From this priority on tasks are long, and let all others through.
_LONG = _PRIORITY[Queue.BATCH]


@dataclass(order=True)
class _Task:
    """One call of a job function, ordered by its queue, then by age; clicks that are known to take long come last."""

    priority: int
    long: bool
    number: int
    function: str = field(compare=False)
    argument: dict[str, Any] = field(compare=False)
    key: str = field(compare=False)
    done: threading.Event = field(default_factory=threading.Event, compare=False)
    answer: Any = field(default=None, compare=False)
    error: JobFailed | None = field(default=None, compare=False)
    dropped: bool = field(default=False, compare=False)
    created: float = field(default_factory=time.monotonic, compare=False)
    running: Cancellable | None = field(default=None, compare=False)


class InProcessRunner:
    """Runs the job functions of `worker.tasks` on one thread of this process, clicks before images to encode ahead.

    One thread, because the model is one. A click waits for at most one layer of whatever is encoded: of a batch, ahead,
    or for another click; one that has to encode something itself waits for those before it that do.
    Imports the worker when the first job comes, so the web process starts without torch.
    """

    def __init__(self, options: RuntimeOptions, *, max_waiting: int = 64) -> None:
        self._options = options
        self._counts = JobCounts()
        self._max_waiting = max_waiting
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[str, _Task] = {}  # by session, or by image
        self._running: tuple[_Task, float] | None = None
        self._configured = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="bald-sam-model", daemon=True)
        self._thread.start()

    def segment(self, job: SegmentJob, *, deadline_s: float) -> SegmentResult:
        key = f"{Queue.INTERACTIVE}:{job.session}"
        task = self._task(Queue.INTERACTIVE, contract.SEGMENT, job.model_dump(mode="json"), key)
        with self._lock:
            if self._closed:
                raise JobFailed("The service is stopping.", "Click again in a moment.", 503, 5)
            older = self._waiting.pop(key, None)
            if older is not None:
                self._drop(older, superseded())
            elif sum(other.priority == task.priority for other in self._waiting.values()) >= self._max_waiting:
                raise too_many()
            self._waiting[key] = task
        self._tasks.put(task)
        if not task.done.wait(deadline_s):
            with self._lock:
                self._drop(task, too_late(deadline_s))
                if self._waiting.get(key) is task:
                    del self._waiting[key]
                if task.running is not None:  # nobody waits for it any more, and others wait behind it
                    task.running.cancel()
            raise too_late(deadline_s)
        if task.error is not None:
            raise task.error
        return to_result(task.answer)

    def embed(self, job: EmbedJob) -> None:
        for image in job.images:
            key = f"{Queue.EMBED}:{image_key(image)}"
            argument = EmbedJob(images=(image,)).model_dump(mode="json")
            with self._lock:
                running = self._running is not None and self._running[0].key == key
                if self._closed or running or key in self._waiting:
                    continue
                if sum(key.startswith(Queue.EMBED) for key in self._waiting) >= MAX_EMBED_WAITING:
                    log.info("too many images wait to be encoded; one more is left for its first click")
                    continue
                task = self._task(Queue.EMBED, contract.EMBED, argument, key)
                self._waiting[key] = task
            self._tasks.put(task)

    def prelabel(
        self, items: Iterable[PrelabelItem], options: PrelabelOptions
    ) -> Iterator[PrelabelImage | PrelabelFailure]:
        under_way: deque[_Task] = deque()
        chunks = in_chunks(items)
        try:
            while True:
                while len(under_way) < 2 and (chunk := next(chunks, None)) is not None:
                    job = PrelabelJob(items=chunk, options=options)
                    under_way.append(self._enqueue_long(Queue.BATCH, contract.PRELABEL, job))
                if not under_way:
                    return
                task = under_way.popleft()
                task.done.wait()
                if task.error is not None:
                    raise task.error
                yield from to_answers(task.answer)
        finally:
            with self._lock:
                for task in under_way:
                    self._drop(task, JobFailed("The batch was stopped.", "Start it again.", 503))
                    self._waiting.pop(task.key, None)

    def train(self, job: TrainJob, progress: Callable[[str, int, int], None] | None = None) -> TrainResult:
        task = self._enqueue_long(Queue.TRAIN, contract.TRAIN, job)
        task.done.wait()
        if task.error is not None:
            raise task.error
        return to_train_result(task.answer)

    def _enqueue_long(self, name: Queue, function: str, job: PrelabelJob | TrainJob) -> _Task:
        task = self._task(name, function, job.model_dump(mode="json"), f"{name}:{uuid.uuid4()}")
        with self._lock:
            if self._closed:
                raise JobFailed("The service is stopping.", "It goes on with the next start.", 503, 5)
            self._waiting[task.key] = task
        self._tasks.put(task)
        return task

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        with self._lock:
            created: dict[Queue, list[float]] = {name: [] for name in Queue}
            for task in self._waiting.values():
                created[list(Queue)[task.priority]].append(task.created)
            running = self._running
        worker: dict[str, Any] = {"name": "in-process", "state": "idle", "queues": list(Queue)}
        if self._configured:
            worker |= {"state": "ready", "facts": importlib.import_module("worker.facts").facts()}
        if running is not None:
            worker |= {"job": running[0].key, "age_s": round(now - running[1], 3)}
        return {
            "runner": "in-process",
            "queues": {str(name): len(times) for name, times in created.items()},
            "workers": [worker],
            "running": [{"job": running[0].key, "age_s": now - running[1]}] if running else [],
            "jobs": {
                str(name): {"oldest_s": round(now - min(times), 3) if times else None}
                | described(self._counts.of(name))
                for name, times in created.items()
            },
        }

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for task in self._waiting.values():
                self._drop(task, JobFailed("The service is stopping.", "Click again in a moment.", 503, 5))
            self._waiting.clear()
        self._tasks.put(self._task(Queue.INTERACTIVE, "", {}, ""))

    def _task(self, name: Queue, function: str, argument: dict[str, Any], key: str) -> _Task:
        return _Task(_PRIORITY[name], False, next(self._numbers), function, argument, key)

    @staticmethod
    def _drop(task: _Task, error: JobFailed) -> None:
        task.dropped, task.error = True, error
        task.done.set()

    def _work(self) -> None:
        while not self._closed:
            self._run(self._tasks.get())

    def _run(self, task: _Task) -> None:
        with self._lock:
            if self._closed or task.dropped:
                return
            if self._waiting.get(task.key) is task:
                del self._waiting[task.key]
            outer, self._running = self._running, (task, time.monotonic())
        name = list(Queue)[task.priority]
        logs.bind(fresh=True, job=task.key, request=task.argument.get("request"), session=task.argument.get("session"))
        try:
            with self._letting_through(task), nullcontext() if task.priority >= _LONG else self._cancellable(task):
                task.answer = self._call(task.function, task.argument)
        except NotQuickError:
            self._wait_for_turn(task)
            with self._lock:
                self._running = outer
            return
        except JobTimeoutException:
            log.warning("%s was ended: its time was up", task.function)
            self._counts.count(name, "failed", "Its time was up.")
        except Exception as error:
            log.exception("%s failed", task.function)
            task.error = worker_failed(repr(error))
            self._counts.count(name, "failed", f"{type(error).__name__}; the log has it.")
        else:
            self._counts.count(name, *contract.outcome_of(task.answer))
        with self._lock:
            self._running = outer
        task.done.set()

    @contextmanager
    def _cancellable(self, task: _Task) -> Iterator[None]:
        """For the time of a short task: whoever gives up on it ends it."""
        with Cancellable(JobTimeoutException) as running:
            with self._lock:
                if task.dropped:
                    raise JobTimeoutException
                task.running = running
            try:
                yield
            finally:
                task.running = None

    def _wait_for_turn(self, task: _Task) -> None:
        """Put back a click that was let through and has to encode, unless it is not wanted any more."""
        task.long = True
        with self._lock:
            if self._closed or task.dropped:
                return
            if task.key in self._waiting:
                self._drop(task, superseded())
                return
            self._waiting[task.key] = task
        self._tasks.put(task)

    def _letting_through(self, task: _Task) -> Any:
        """For the time of a task: what is more urgent is done in the middle of it, when it asks."""

        def is_more_urgent(other: _Task) -> bool:
            if task.priority >= _LONG:
                return other.priority < _LONG
            return other.priority == _CLICK and not other.long

        def do_what_is_urgent() -> None:
            while not self._closed:
                with self._tasks.mutex:
                    waiting = self._tasks.queue
                    if not waiting or not is_more_urgent(waiting[0]):
                        return
                with task.running.set_aside() if task.running else nullcontext():
                    self._run(self._tasks.get())  # this thread alone takes tasks: it is the one seen, or better

        preemption = importlib.import_module("worker.preemption")
        return preemption.letting_through(do_what_is_urgent, quick=task.priority < _LONG)

    def _call(self, function: str, argument: dict[str, Any]) -> Any:
        if function not in contract.JOB_FUNCTIONS:
            raise ValueError(f"{function} is not a job function")
        if not self._configured:
            importlib.import_module("worker.runtime").configure(self._options)
            self._configured = True
        module, _, name = function.rpartition(".")
        return getattr(importlib.import_module(module), name)(argument)
