"""Training through a real Redis with real workers, whose job function is the one of `queue_worker`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from ml_backend.jobs.failures import JobFailed
from ml_backend.jobs.rq_runner import RqRunner
from tests.ml_backend.jobs.queue_workers import Workers, until
from worker.contract import TrainJob


def job(verb: str) -> TrainJob:
    return TrainJob(project=3, objects=(), notes={"do": verb})


def test_a_worker_trains(workers: Workers, redis_runner: RqRunner) -> None:
    workers.start()
    assert redis_runner.train(job("answer")).head == "project-3-v1"
    with pytest.raises(JobFailed, match="Too few"):
        redis_runner.train(job("fail"))


def test_training_waits_for_a_worker_and_says_so(workers: Workers, redis_runner: RqRunner) -> None:
    told: list[tuple[str, int]] = []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(redis_runner.train, job("answer"), lambda stage, done, total: told.append((stage, done)))
        until(lambda: told)
        assert told[0] == ("waiting", 0)
        workers.start()
        assert waiting.result(60).used


def test_a_killed_worker_loses_its_job_to_another(workers: Workers, redis_runner: RqRunner, tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    first = workers.start()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(redis_runner.train, job(f"hang-once:{mark}"))
        until(mark.exists, 60)
        first.kill()
        workers.start()
        assert waiting.result(60).head == "project-3-v1"


def test_what_is_under_way_already_is_not_begun_twice(workers: Workers, redis_runner: RqRunner, redis_url: str) -> None:
    done = []
    threads = [threading.Thread(target=lambda: done.append(redis_runner.train(job("answer")))) for _ in range(3)]
    for thread in threads:
        thread.start()
        with redis.Redis.from_url(redis_url) as client:
            until(lambda client=client: client.llen("rq:queue:train"))  # type: ignore[misc]
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen("rq:queue:train") == 1
    workers.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 3
