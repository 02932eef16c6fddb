"""A worker process: keeps the model loaded and takes jobs from Redis, as long as it is not told to stop.

A thread tells Redis every fraction of a second that the process lives, and which job it carries
(`worker.heartbeat`); see `ml_backend.jobs.rq_runner` for who reads that.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterable, Sequence

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer

from worker.contract import JOB_FUNCTIONS, Queue, RuntimeOptions
from worker.heartbeat import Heartbeat
from worker.rq_worker import ModelWorker

log = logging.getLogger(__name__)

#: RQ's own bookkeeping, seconds: how long its record of a worker lives, and how often it looks for lost jobs.
WORKER_TTL_S = 30
MAINTENANCE_S = 30
#: Between two tries to reach a Redis that is away, seconds.
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 2.0
#: A model that cannot be loaded is tried again after this time, seconds: what is wrong may be mended meanwhile.
LOAD_AGAIN_S = 5.0


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
