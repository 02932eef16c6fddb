"""Workers that die, hang or do not start, a Redis that goes away, clocks that jump: no click is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from ml_backend.jobs.rq_runner import RqRunner
from tests.ml_backend.jobs.queue_workers import Workers, carried, click, ready, refusal, until
from worker.contract import EmbedJob, ImageRef


def pid_of(name: str) -> int:
    return int(name.split("-")[-2])


def test_kill_in_mid_click_is_answered_by_another_worker(
    redis_runner: RqRunner, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.start()
    workers.start()
    ready(redis_runner, 2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(redis_runner.segment, click("sleep:0.8"), deadline_s=30)
        until(lambda: carried(redis_runner))
        victim = pid_of(carried(redis_runner)[0]["worker"])
        process = next(process for process in workers.processes if process.pid == victim)
        process.kill()
        killed = time.perf_counter()
        result = answer.result()
        with capsys.disabled():
            sys.stdout.write(f"\nanswered {time.perf_counter() - killed:.2f} s after the kill (0.8 s of it the job)\n")
    assert result.area == 7
    assert result.model_version != str(victim)


def test_kill_in_the_middle_of_a_click_within_another_loses_neither(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(redis_runner, 1)
    with ThreadPoolExecutor(3) as pool:
        outer = pool.submit(redis_runner.segment, click("encode:2", 1), deadline_s=30)
        until(lambda: carried(redis_runner))
        victim = pid_of(carried(redis_runner)[0]["worker"])
        first = carried(redis_runner)[0]["job"]
        waits = pool.submit(redis_runner.segment, click("encode:0.1:other", 2), deadline_s=30)
        until(lambda: redis_runner.status()["queues"]["interactive"] == 1)
        inner = pool.submit(redis_runner.segment, click("sleep:1", 3), deadline_s=30)
        until(lambda: carried(redis_runner) and carried(redis_runner)[0]["job"] != first)
        workers.start()
        next(process for process in workers.processes if process.pid == victim).kill()
        results = [one.result() for one in (outer, waits, inner)]
    assert [one.area for one in results] == [1, 2, 3]
    assert str(victim) not in {one.model_version for one in results}


def test_a_job_that_kills_workers_is_not_tried_for_ever(redis_runner: RqRunner, workers: Workers) -> None:
    for _ in range(4):
        workers.start()
    ready(redis_runner, 4)
    failed = refusal(lambda: redis_runner.segment(click("die"), deadline_s=60))
    assert failed.status == 503
    assert "3 times" in failed.error
    until(lambda: len(redis_runner.status()["workers"]) == 1)
    assert redis_runner.segment(click("next"), deadline_s=10).area == 7


def test_no_worker_is_said_quickly_and_heals(
    redis_runner: RqRunner, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.start()
    ready(redis_runner, 1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(redis_runner.segment, click("sleep:30"), deadline_s=60)
        until(lambda: carried(redis_runner))
        workers.processes[0].kill()
        killed = time.perf_counter()
        failed = refusal(answer.result)
    with capsys.disabled():
        sys.stdout.write(f"\nrefused {time.perf_counter() - killed:.2f} s after the kill of the only worker\n")
    assert failed.status == 503
    assert "bald-sam worker" in failed.hint
    assert failed.retry_after
    assert refusal(lambda: redis_runner.segment(click("b"), deadline_s=60)).status == 503
    assert redis_runner.status()["queues"]["interactive"] == 0
    workers.start()
    ready(redis_runner, 1)
    assert redis_runner.segment(click("c"), deadline_s=10).area == 7


def test_a_worker_that_cannot_load_its_model_says_why_and_tries_again(
    redis_runner: RqRunner, workers: Workers, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    workers.start(BROKEN=str(broken))
    until(lambda: [worker["state"] for worker in redis_runner.status()["workers"]] == ["failed"])
    failed = refusal(lambda: redis_runner.segment(click("a"), deadline_s=10))
    assert (failed.status, "The head is damaged." in failed.error) == (503, True)
    workers.start()
    until(lambda: sorted(worker["state"] for worker in redis_runner.status()["workers"]) == ["failed", "ready"])
    for x in range(5):
        assert redis_runner.segment(click("b", x), deadline_s=10).area == x
    broken.unlink()
    ready(redis_runner, 2)


def test_a_job_that_hangs_ends_its_worker(redis_runner: RqRunner, workers: Workers) -> None:
    process = workers.start()
    ready(redis_runner, 1)
    assert refusal(lambda: redis_runner.segment(click("hang"), deadline_s=1)).status == 504
    assert process.wait(20) == 70
    assert "hangs since" in workers.logs()
    until(lambda: not redis_runner.status()["workers"])
    workers.start()
    ready(redis_runner, 1)
    assert redis_runner.segment(click("next"), deadline_s=20).area == 7


def test_a_job_taken_but_never_started_is_found(redis_runner: RqRunner, workers: Workers, redis_url: str) -> None:
    """A worker killed between taking a job and starting it leaves no trace: the test takes the job and is no worker."""
    workers.start()
    ready(redis_runner, 1)
    with redis.Redis.from_url(redis_url) as client, ThreadPoolExecutor(2) as pool:
        busy = pool.submit(redis_runner.segment, click("sleep:1"), deadline_s=30)
        until(lambda: carried(redis_runner))
        answer = pool.submit(redis_runner.segment, click("a"), deadline_s=30)
        until(lambda: client.lpop("rq:queue:interactive"))
        assert answer.result().area == 7
        assert busy.result().area == 7


def test_sigterm_finishes_the_running_job(redis_runner: RqRunner, workers: Workers) -> None:
    process = workers.start()
    ready(redis_runner, 1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(redis_runner.segment, click("sleep:1"), deadline_s=30)
        until(lambda: carried(redis_runner))
        process.terminate()
        assert answer.result().area == 7
    assert process.wait(10) == 0
    assert redis_runner.status()["workers"] == []


def test_a_clock_that_jumps_on_another_machine_fails_no_click(
    redis_runner: RqRunner, workers: Workers, redis_url: str
) -> None:
    """Forward in Redis: all that has a lifetime is gone. Forward in another worker: RQ's clean-up gives up the job."""
    workers.start()
    ready(redis_runner, 1)
    with redis.Redis.from_url(redis_url) as client, ThreadPoolExecutor(2) as pool:
        begun = pool.submit(redis_runner.segment, click("sleep:1.5"), deadline_s=40)
        until(lambda: carried(redis_runner))
        waiting = pool.submit(redis_runner.segment, click("a", 3), deadline_s=40)
        until(lambda: redis_runner.status()["queues"]["interactive"] == 1)
        gone = [name for name in client.scan_iter() if client.pttl(name) > 0]
        assert any(name.startswith(b"rq:job:") for name in gone)
        client.delete(*gone)
        assert (begun.result().area, waiting.result().area) == (7, 3)
        answer = pool.submit(redis_runner.segment, click("sleep:1.5"), deadline_s=40)
        until(lambda: carried(redis_runner))
        started = StartedJobRegistry("interactive", connection=client, serializer=JSONSerializer)
        started.cleanup(timestamp=time.time() + 86400)
        assert answer.result().area == 7
    assert redis_runner.segment(click("next"), deadline_s=10).area == 7


class Redis:
    """A Redis of one test that can be killed and started again, empty."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self.command = ["redis-server", "--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "no"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:

            def up() -> bool:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

            until(up)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Redis]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = Redis(probe.getsockname()[1], tmp_path)
    yield server
    server.kill()


def test_redis_later_than_the_worker_gone_and_back_empty(own_redis: Redis, tmp_path: Path) -> None:
    workers = Workers(own_redis.url, tmp_path)
    redis_runner = RqRunner(own_redis.url)
    try:
        worker = workers.start()
        failed = refusal(lambda: redis_runner.segment(click("a"), deadline_s=10))
        assert (failed.status, "BALD_SAM_REDIS_URL" in failed.hint) == (503, True)
        redis_runner.embed(EmbedJob(images=(ImageRef(url="x"),)))
        assert "error" in redis_runner.status()
        until(lambda: "Redis does not answer" in workers.logs())
        own_redis.start()
        ready(redis_runner, 1)
        assert redis_runner.segment(click("a"), deadline_s=10).area == 7
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(redis_runner.segment, click("sleep:1"), deadline_s=40)
            until(lambda: carried(redis_runner))
            own_redis.kill()
            restart = threading.Timer(1.0, own_redis.start)
            restart.start()
            assert answer.result().area == 7
            restart.join()
        ready(redis_runner, 1)
        assert redis_runner.segment(click("b"), deadline_s=10).area == 7
        assert worker.poll() is None
        assert workers.logs().count("Redis does not answer") <= 2
    finally:
        workers.stop()
        redis_runner.close()
