from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from rq import Queue as RqQueue
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from ml_backend import rq_runner
from ml_backend.cli import main
from ml_backend.jobs import JobFailed
from ml_backend.rq_results import with_mask
from ml_backend.rq_runner import RqRunner
from tests.ml_backend.queue_workers import Workers, click, ready, until
from worker.contract import LARGE_MASK, MASK_KEY, EmbedJob, ImageRef


def refusal(call: Callable[[], Any]) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        call()
    return caught.value


def carried(redis_runner: RqRunner) -> list[dict[str, Any]]:
    running: list[dict[str, Any]] = redis_runner.status()["running"]
    return running


def pid_of(name: str) -> int:
    return int(name.split("-")[-2])


def test_a_click_is_answered_and_hops_are_short(
    redis_runner: RqRunner, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.start()
    ready(redis_runner, 1)
    times = []
    for x in range(120):
        start = time.perf_counter()
        assert redis_runner.segment(click("a", x), deadline_s=10).area == x
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    with capsys.disabled():
        sys.stdout.write(f"\nhop over RQ: p50 {times[60]:.1f} ms, p95 {times[114]:.1f} ms\n")
    assert redis_runner.status()["queues"]["interactive"] == 0


def test_a_large_mask_travels_beside_the_answer_and_is_taken_away(
    redis_runner: RqRunner, workers: Workers, redis_url: str
) -> None:
    workers.start()
    ready(redis_runner, 1)
    with redis.Redis.from_url(redis_url) as client:
        for count in (0, 3, LARGE_MASK, 400_000):
            assert redis_runner.segment(click(f"mask:{count}"), deadline_s=10).rle == bytes(
                i % 251 for i in range(count)
            )
            assert not list(client.scan_iter(MASK_KEY + "*"))


def test_a_mask_that_redis_has_lost_is_made_again(
    redis_runner: RqRunner, workers: Workers, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.start()
    ready(redis_runner, 1)
    read: list[str] = []

    def forgetful(client: redis.Redis, job_id: str, answer: Any) -> Any:
        if not read:
            assert client.delete(MASK_KEY + job_id)
        read.append(job_id)
        return with_mask(client, job_id, answer)

    monkeypatch.setattr(rq_runner, "with_mask", forgetful)
    assert len(redis_runner.segment(click("mask:400000"), deadline_s=10).rle) == 400_000
    assert [job_id[-2:] for job_id in read] == ["-1", "-2"]


def test_failures_are_told_in_words(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(redis_runner, 1)
    failed = refusal(lambda: redis_runner.segment(click("fail"), deadline_s=10))
    assert (failed.error, failed.hint, failed.status) == ("No.", "Try this.", 422)
    failed = refusal(lambda: redis_runner.segment(click("raise"), deadline_s=10))
    assert failed.status == 500
    assert "secret" not in failed.error + failed.hint
    assert failed.hint.rstrip(".").split()[-1] in workers.logs()
    assert "a secret of the worker" in workers.logs()
    assert redis_runner.segment(click("next"), deadline_s=10).area == 7


def test_it_is_counted_what_became_of_jobs_and_how_long_they_wait(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(redis_runner, 1)
    redis_runner.segment(click("a"), deadline_s=10)
    refusal(lambda: redis_runner.segment(click("fail"), deadline_s=10))
    refusal(lambda: redis_runner.segment(click("raise"), deadline_s=10))

    def counted() -> list[int]:
        return [redis_runner.status()["jobs"]["interactive"][name]["count"] for name in ("done", "refused", "failed")]

    until(lambda: counted() == [1, 1, 1])
    ended = redis_runner.status()["jobs"]["interactive"]
    assert (ended["refused"]["said"], ended["refused"]["age_s"] < 60) == ("No. Try this.", True)
    assert "RuntimeError" in ended["failed"]["said"]
    assert "secret" not in ended["failed"]["said"]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(redis_runner.segment, click(f"sleep:0.6{i}"), deadline_s=20) for i in range(2)]
        until(lambda: redis_runner.status()["jobs"]["interactive"]["oldest_s"])
        (worker,) = redis_runner.status()["workers"]
        assert (worker["state"], worker["queues"][0], worker["facts"]["memory"] > 0) == ("ready", "interactive", True)
        assert [answer.result().area for answer in answers] == [7, 7]


def test_a_later_click_drops_the_waiting_one_at_once(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(redis_runner, 1)
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(redis_runner.segment, click("sleep:1.5"), deadline_s=20)
        until(lambda: carried(redis_runner))
        older = pool.submit(redis_runner.segment, click("s", 1), deadline_s=20)
        until(lambda: redis_runner.status()["queues"]["interactive"] == 1)
        other = pool.submit(redis_runner.segment, click("t", 3), deadline_s=20)
        until(lambda: redis_runner.status()["queues"]["interactive"] == 2)
        newer = pool.submit(redis_runner.segment, click("s", 2), deadline_s=20)
        assert refusal(older.result).status == 409
        assert not busy.done()
        assert (newer.result().area, other.result().area, busy.result().area) == (2, 3, 7)


def test_a_late_click_is_refused_and_leaves_the_queue(redis_runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(redis_runner, 1)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(redis_runner.segment, click("sleep:1.5"), deadline_s=20)
        until(lambda: carried(redis_runner))
        assert refusal(lambda: redis_runner.segment(click("s"), deadline_s=0.4)).status == 504
        assert redis_runner.status()["queues"]["interactive"] == 0
        busy.result()


def test_a_full_queue_says_when_to_come_back(redis_url: str, workers: Workers) -> None:
    redis_runner = RqRunner(redis_url, max_waiting=1)
    workers.start()
    ready(redis_runner, 1)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(redis_runner.segment, click("sleep:1"), deadline_s=20)
        until(lambda: carried(redis_runner))
        waiting = pool.submit(redis_runner.segment, click("s"), deadline_s=20)
        until(lambda: redis_runner.status()["queues"]["interactive"] == 1)
        failed = refusal(lambda: redis_runner.segment(click("t"), deadline_s=20))
        assert failed.status == 503
        assert failed.retry_after
        assert waiting.result().area == 7
    redis_runner.close()


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


def test_check_says_whether_a_worker_of_this_machine_is_ready(
    redis_runner: RqRunner, workers: Workers, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()

    def check() -> tuple[int, str]:
        done = CliRunner().invoke(main, ["worker", "--check", "--redis-url", workers.url])
        return done.exit_code, done.output

    assert check() == (1, "No worker of this machine is alive.\n")
    workers.start(BROKEN=str(broken))
    until(lambda: [worker["state"] for worker in redis_runner.status()["workers"]] == ["failed"])
    assert check()[0] == 1
    assert "The head is damaged." in check()[1]
    broken.unlink()
    ready(redis_runner, 1)
    assert (check()[0], "ready" in check()[1]) == (0, True)


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


def test_embeds_are_done_once_and_never_raise(redis_runner: RqRunner, workers: Workers, tmp_path: Path) -> None:
    note = tmp_path / "note"
    job = EmbedJob(images=(ImageRef(url=f"note:{note}"),))
    for _ in range(5):
        redis_runner.embed(job)
    assert redis_runner.status()["queues"]["embed"] == 1
    workers.start()
    until(note.exists)
    until(lambda: not carried(redis_runner))
    assert note.read_text() == "embedded\n"
    redis_runner.embed(EmbedJob(images=tuple(ImageRef(url=str(i)) for i in range(1000))))
    assert redis_runner.status()["queues"]["embed"] == 0


def test_clicks_go_before_images_to_encode(redis_runner: RqRunner, workers: Workers) -> None:
    for i in range(20):
        redis_runner.embed(EmbedJob(images=(ImageRef(url="sleep:0.2", task=i),)))
    workers.start()
    until(lambda: carried(redis_runner))
    assert redis_runner.segment(click("a"), deadline_s=20).area == 7
    assert redis_runner.status()["queues"]["embed"] > 10


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


def test_functions_off_the_list_are_never_imported(
    redis_runner: RqRunner, workers: Workers, redis_url: str, tmp_path: Path
) -> None:
    workers.start()
    ready(redis_runner, 1)
    mark = tmp_path / "mark"
    with redis.Redis.from_url(redis_url) as client:
        json_queue = RqQueue("interactive", connection=client, serializer=JSONSerializer)
        pickle_queue = RqQueue("interactive", connection=client)
        jobs = [
            json_queue.enqueue_call("os.system", args=(f"touch {mark}",)),
            json_queue.enqueue_call("antigravity.fly"),
            pickle_queue.enqueue_call("os.system", args=(f"touch {mark}",)),
        ]
        until(lambda: all(job.get_status(refresh=True) == "failed" for job in jobs))
        hook = json_queue.enqueue_call("worker.tasks.segment", args=(click("raise").model_dump(mode="json"),))
        until(lambda: hook.get_status(refresh=True) == "failed")
        poisoned = json_queue.create_job("worker.tasks.segment", args=(click("fail").model_dump(mode="json"),))
        poisoned._success_callback_name = poisoned._failure_callback_name = "antigravity.fly"
        json_queue.enqueue_job(poisoned)
        until(lambda: poisoned.get_status(refresh=True) == "finished")
    assert not mark.exists()
    assert workers.logs().count("refused: ") == 3
    assert redis_runner.segment(click("a"), deadline_s=10).area == 7
