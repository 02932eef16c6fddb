"""Batches through a real Redis and real workers that are killed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from ml_backend.jobs import rq_batch
from ml_backend.jobs.failures import JobFailed
from ml_backend.jobs.rq_runner import RqRunner
from tests.ml_backend.jobs.queue_workers import Workers, click, ready, until
from worker.contract import ImageRef, PrelabelFailure, PrelabelImage, PrelabelItem, PrelabelOptions


def items(*keys: str) -> list[PrelabelItem]:
    return [PrelabelItem(key=key, image=ImageRef(url=key)) for key in keys]


def answers(redis_runner: RqRunner, *keys: str) -> list[Any]:
    return list(redis_runner.prelabel(items(*keys), PrelabelOptions()))


def test_every_image_is_answered_once(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    workers.start()
    keys = [f"a{number}" for number in range(60)]
    found = answers(redis_runner, *keys)
    assert Counter(one.key for one in found) == Counter(keys)
    assert all(isinstance(one, PrelabelImage) for one in found)
    assert redis_runner.status()["queues"]["batch"] == 0


def test_killed_workers_lose_and_double_nothing(redis_runner: RqRunner, workers: Workers) -> None:
    first, _ = workers.start(), workers.start()
    ready(redis_runner, 2)
    keys = [f"sleep:0.05:{number}" for number in range(80)]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(answers(redis_runner, *keys)))
    thread.start()
    until(lambda: len(redis_runner.status()["running"]) == 2)
    first.kill()
    workers.start()
    thread.join(60)
    assert Counter(one.key for one in found) == Counter(keys)
    assert all(isinstance(one, PrelabelImage) for one in found)


def test_what_kills_its_workers_is_given_up_alone(
    redis_runner: RqRunner, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rq_batch, "LOST_S", 0.5)
    stop = threading.Event()

    def supervise() -> None:
        while not stop.wait(0.05):
            if all(process.poll() is not None for process in workers.processes):
                workers.start()

    workers.start()
    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    try:
        found = answers(redis_runner, "a", "die", "b")
    finally:
        stop.set()
        supervisor.join()
    (failed,) = [one for one in found if isinstance(one, PrelabelFailure)]
    assert failed.key == "die"
    assert "3 times" in failed.error
    assert sorted(one.key for one in found) == ["a", "b", "die"]


def test_a_fault_concerns_its_own_image(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    found = {one.key: one for one in answers(redis_runner, "a", "raise", "b")}
    assert isinstance(found["raise"], PrelabelFailure)
    assert "secret" not in found["raise"].error
    assert isinstance(found["a"], PrelabelImage)
    assert isinstance(found["b"], PrelabelImage)


def test_what_concerns_all_ends_the_batch_in_words(
    redis_runner: RqRunner, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rq_batch, "PATIENCE_S", 0.5)
    with pytest.raises(JobFailed, match="No worker takes jobs of the batch queue"):
        answers(redis_runner, "a")
    assert redis_runner.status()["queues"]["batch"] == 0
    workers.start()
    ready(redis_runner, 1)
    with pytest.raises(JobFailed, match="Try this"):
        answers(redis_runner, "fail")


def test_a_click_does_not_wait_for_the_batch(redis_runner: RqRunner, workers: Workers) -> None:
    """One worker, a job of ten seconds: the click is answered in the middle of it, and the job is not lost for that."""
    workers.start()
    ready(redis_runner, 1)
    found: list[Any] = []
    keys = ["long:10:a", "b"]
    thread = threading.Thread(target=lambda: found.extend(answers(redis_runner, *keys)))
    thread.start()
    until(lambda: any(one["job"].startswith("prelabel") for one in redis_runner.status()["running"]))
    assert (
        redis_runner.segment(click("sleep:2"), deadline_s=8).area == 7
    )  # longer than a lost job is believed to be there
    assert not found
    thread.join(60)
    assert sorted(one.key for one in found) == sorted(keys)
    assert workers.logs().count("long done") == 1


def test_leaving_a_batch_takes_its_jobs_out(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(redis_runner, 1)
    batch = redis_runner.prelabel(items(*[f"sleep:0.2:{n}" for n in range(100)]), PrelabelOptions())
    next(batch)
    batch.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert redis_runner.status()["queues"]["batch"] == 0
