"""What a worker does with jobs that somebody else put into Redis. Real kills: tests/ml_backend/jobs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import redis
from rq import Queue as RqQueue
from rq.job import Callback, JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from worker.contract import JOB_FUNCTIONS, SEGMENT
from worker.rq_worker import ModelWorker


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as opened:
        yield opened


@pytest.fixture
def worker(client: redis.Redis) -> ModelWorker:
    return ModelWorker(
        ["interactive"], connection=client, serializer=JSONSerializer, functions=JOB_FUNCTIONS, heartbeat=Mock()
    )


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `trap` that leaves a mark when it is imported; returns where."""
    mark = tmp_path / "mark"
    (tmp_path / "trap.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef run(*args): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield_to = sys.modules.pop("trap", None)
    assert yield_to is None
    return mark


@pytest.mark.parametrize("function", ["trap.run", SEGMENT])
def test_cleaning_up_calls_nothing_that_a_lost_job_names(
    client: redis.Redis, worker: ModelWorker, trap: Path, function: str
) -> None:
    """RQ itself calls the failure callback of a job whose worker died, and posts to its addresses."""
    queue = RqQueue("interactive", connection=client, serializer=JSONSerializer)
    job = queue.create_job(function, on_failure=Callback("trap.run"), on_success=Callback("trap.run"))
    job.webhooks = [Webhook("http://127.0.0.1:9/", "failed")]
    job.set_status(JobStatus.STARTED)
    job.save()
    registry = StartedJobRegistry("interactive", connection=client, serializer=JSONSerializer)
    client.zadd(registry.key, {f"{job.id}:execution": 1.0})
    worker.clean_registries()
    job.refresh()
    assert job.get_status() == JobStatus.FAILED
    assert not trap.exists()


@pytest.mark.parametrize("serializer", [JSONSerializer, None])
def test_a_function_off_the_list_is_not_even_imported(
    client: redis.Redis, worker: ModelWorker, trap: Path, serializer: type[JSONSerializer] | None
) -> None:
    queue = RqQueue("interactive", connection=client, serializer=serializer)
    job = queue.enqueue_call("trap.run", on_failure=Callback("trap.run"))
    worker.work(burst=True, logging_level="CRITICAL")
    assert client.hget(f"rq:job:{job.id}", "status") == b"failed"
    assert not trap.exists()


def test_the_list_has_nothing_but_functions_of_our_own() -> None:
    assert all(name.split(".")[0] in {"worker", "evaluation"} and name.count(".") == 2 for name in JOB_FUNCTIONS)
