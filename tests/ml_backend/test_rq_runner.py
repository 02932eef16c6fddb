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
from worker.contract import LARGE_MASK, MASK_KEY, Click, EmbedJob, ImageRef, Prompts, SegmentJob

SCRIPT = Path(__file__).with_name("queue_worker.py")
ROOT = SCRIPT.parents[2]


def click(session: str, x: float = 7.0) -> SegmentJob:
    return SegmentJob(
        image=ImageRef(url="a.png"), width=4, height=3, prompts=Prompts(clicks=(Click(x=x, y=1),)), session=session
    )


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def refusal(call: Callable[[], Any]) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        call()
    return caught.value


class Workers:
    """Real worker processes of one test."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"worker-{len(self.processes)}.log").open("wb") as log:
            command = [sys.executable, str(SCRIPT), self.url]
            process = subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)} | env, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("worker-*.log")))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Workers]:
    started = Workers(redis_url, tmp_path)
    yield started
    started.stop()


@pytest.fixture
def runner(redis_url: str) -> Iterator[RqRunner]:
    made = RqRunner(redis_url)
    yield made
    made.close()


def ready(runner: RqRunner, count: int) -> None:
    until(lambda: [worker["state"] for worker in runner.status()["workers"]] == ["ready"] * count)


def carried(runner: RqRunner) -> list[dict[str, Any]]:
    running: list[dict[str, Any]] = runner.status()["running"]
    return running


def pid_of(name: str) -> int:
    return int(name.split("-")[-2])


def test_a_click_is_answered_and_hops_are_short(
    runner: RqRunner, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.start()
    ready(runner, 1)
    times = []
    for x in range(120):
        start = time.perf_counter()
        assert runner.segment(click("a", x), deadline_s=10).area == x
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    with capsys.disabled():
        sys.stdout.write(f"\nhop over RQ: p50 {times[60]:.1f} ms, p95 {times[114]:.1f} ms\n")
    assert runner.status()["queues"]["interactive"] == 0


def test_a_large_mask_travels_beside_the_answer_and_is_taken_away(
    runner: RqRunner, workers: Workers, redis_url: str
) -> None:
    workers.start()
    ready(runner, 1)
    with redis.Redis.from_url(redis_url) as client:
        for count in (0, 3, LARGE_MASK, 400_000):
            assert runner.segment(click(f"mask:{count}"), deadline_s=10).rle == bytes(i % 251 for i in range(count))
            assert not list(client.scan_iter(MASK_KEY + "*"))


def test_a_mask_that_redis_has_lost_is_made_again(
    runner: RqRunner, workers: Workers, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.start()
    ready(runner, 1)
    read: list[str] = []

    def forgetful(client: redis.Redis, job_id: str, answer: Any) -> Any:
        if not read:
            assert client.delete(MASK_KEY + job_id)
        read.append(job_id)
        return with_mask(client, job_id, answer)

    monkeypatch.setattr(rq_runner, "with_mask", forgetful)
    assert len(runner.segment(click("mask:400000"), deadline_s=10).rle) == 400_000
    assert [job_id[-2:] for job_id in read] == ["-1", "-2"]


def test_failures_are_told_in_words(runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(runner, 1)
    failed = refusal(lambda: runner.segment(click("fail"), deadline_s=10))
    assert (failed.error, failed.hint, failed.status) == ("No.", "Try this.", 422)
    failed = refusal(lambda: runner.segment(click("raise"), deadline_s=10))
    assert failed.status == 500
    assert "secret" not in failed.error + failed.hint
    assert failed.hint.rstrip(".").split()[-1] in workers.logs()
    assert "a secret of the worker" in workers.logs()
    assert runner.segment(click("next"), deadline_s=10).area == 7


def test_it_is_counted_what_became_of_jobs_and_how_long_they_wait(runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(runner, 1)
    runner.segment(click("a"), deadline_s=10)
    refusal(lambda: runner.segment(click("fail"), deadline_s=10))
    refusal(lambda: runner.segment(click("raise"), deadline_s=10))

    def counted() -> list[int]:
        return [runner.status()["jobs"]["interactive"][name]["count"] for name in ("done", "refused", "failed")]

    until(lambda: counted() == [1, 1, 1])
    ended = runner.status()["jobs"]["interactive"]
    assert (ended["refused"]["said"], ended["refused"]["age_s"] < 60) == ("No. Try this.", True)
    assert "RuntimeError" in ended["failed"]["said"]
    assert "secret" not in ended["failed"]["said"]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(runner.segment, click(f"sleep:0.6{i}"), deadline_s=20) for i in range(2)]
        until(lambda: runner.status()["jobs"]["interactive"]["oldest_s"])
        (worker,) = runner.status()["workers"]
        assert (worker["state"], worker["queues"][0], worker["facts"]["memory"] > 0) == ("ready", "interactive", True)
        assert [answer.result().area for answer in answers] == [7, 7]


def test_a_later_click_drops_the_waiting_one_at_once(runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(runner, 1)
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(runner.segment, click("sleep:1.5"), deadline_s=20)
        until(lambda: carried(runner))
        older = pool.submit(runner.segment, click("s", 1), deadline_s=20)
        until(lambda: runner.status()["queues"]["interactive"] == 1)
        other = pool.submit(runner.segment, click("t", 3), deadline_s=20)
        until(lambda: runner.status()["queues"]["interactive"] == 2)
        newer = pool.submit(runner.segment, click("s", 2), deadline_s=20)
        assert refusal(older.result).status == 409
        assert not busy.done()
        assert (newer.result().area, other.result().area, busy.result().area) == (2, 3, 7)


def test_a_late_click_is_refused_and_leaves_the_queue(runner: RqRunner, workers: Workers) -> None:
    workers.start()
    ready(runner, 1)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(runner.segment, click("sleep:1.5"), deadline_s=20)
        until(lambda: carried(runner))
        assert refusal(lambda: runner.segment(click("s"), deadline_s=0.4)).status == 504
        assert runner.status()["queues"]["interactive"] == 0
        busy.result()


def test_a_full_queue_says_when_to_come_back(redis_url: str, workers: Workers) -> None:
    runner = RqRunner(redis_url, max_waiting=1)
    workers.start()
    ready(runner, 1)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(runner.segment, click("sleep:1"), deadline_s=20)
        until(lambda: carried(runner))
        waiting = pool.submit(runner.segment, click("s"), deadline_s=20)
        until(lambda: runner.status()["queues"]["interactive"] == 1)
        failed = refusal(lambda: runner.segment(click("t"), deadline_s=20))
        assert failed.status == 503
        assert failed.retry_after
        assert waiting.result().area == 7
    runner.close()


def test_kill_in_mid_click_is_answered_by_another_worker(
    runner: RqRunner, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.start()
    workers.start()
    ready(runner, 2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(runner.segment, click("sleep:0.8"), deadline_s=30)
        until(lambda: carried(runner))
        victim = pid_of(carried(runner)[0]["worker"])
        process = next(process for process in workers.processes if process.pid == victim)
        process.kill()
        killed = time.perf_counter()
        result = answer.result()
        with capsys.disabled():
            sys.stdout.write(f"\nanswered {time.perf_counter() - killed:.2f} s after the kill (0.8 s of it the job)\n")
    assert result.area == 7
    assert result.model_version != str(victim)


def test_a_job_that_kills_workers_is_not_tried_for_ever(runner: RqRunner, workers: Workers) -> None:
    for _ in range(4):
        workers.start()
    ready(runner, 4)
    failed = refusal(lambda: runner.segment(click("die"), deadline_s=60))
    assert failed.status == 503
    assert "3 times" in failed.error
    until(lambda: len(runner.status()["workers"]) == 1)
    assert runner.segment(click("next"), deadline_s=10).area == 7


def test_no_worker_is_said_quickly_and_heals(
    runner: RqRunner, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.start()
    ready(runner, 1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(runner.segment, click("sleep:30"), deadline_s=60)
        until(lambda: carried(runner))
        workers.processes[0].kill()
        killed = time.perf_counter()
        failed = refusal(answer.result)
    with capsys.disabled():
        sys.stdout.write(f"\nrefused {time.perf_counter() - killed:.2f} s after the kill of the only worker\n")
    assert failed.status == 503
    assert "bald-sam worker" in failed.hint
    assert failed.retry_after
    assert refusal(lambda: runner.segment(click("b"), deadline_s=60)).status == 503
    assert runner.status()["queues"]["interactive"] == 0
    workers.start()
    ready(runner, 1)
    assert runner.segment(click("c"), deadline_s=10).area == 7


def test_a_worker_that_cannot_load_its_model_says_why_and_tries_again(
    runner: RqRunner, workers: Workers, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    workers.start(BROKEN=str(broken))
    until(lambda: [worker["state"] for worker in runner.status()["workers"]] == ["failed"])
    failed = refusal(lambda: runner.segment(click("a"), deadline_s=10))
    assert (failed.status, "The head is damaged." in failed.error) == (503, True)
    workers.start()
    until(lambda: sorted(worker["state"] for worker in runner.status()["workers"]) == ["failed", "ready"])
    for x in range(5):
        assert runner.segment(click("b", x), deadline_s=10).area == x
    broken.unlink()
    ready(runner, 2)


def test_check_says_whether_a_worker_of_this_machine_is_ready(
    runner: RqRunner, workers: Workers, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()

    def check() -> tuple[int, str]:
        done = CliRunner().invoke(main, ["worker", "--check", "--redis-url", workers.url])
        return done.exit_code, done.output

    assert check() == (1, "No worker of this machine is alive.\n")
    workers.start(BROKEN=str(broken))
    until(lambda: [worker["state"] for worker in runner.status()["workers"]] == ["failed"])
    assert check()[0] == 1
    assert "The head is damaged." in check()[1]
    broken.unlink()
    ready(runner, 1)
    assert (check()[0], "ready" in check()[1]) == (0, True)


def test_a_job_that_hangs_ends_its_worker(runner: RqRunner, workers: Workers) -> None:
    process = workers.start()
    ready(runner, 1)
    assert refusal(lambda: runner.segment(click("hang"), deadline_s=1)).status == 504
    assert process.wait(20) == 70
    assert "hangs since" in workers.logs()
    until(lambda: not runner.status()["workers"])
    workers.start()
    ready(runner, 1)
    assert runner.segment(click("next"), deadline_s=20).area == 7


def test_a_job_taken_but_never_started_is_found(runner: RqRunner, workers: Workers, redis_url: str) -> None:
    """A worker killed between taking a job and starting it leaves no trace: the test takes the job and is no worker."""
    workers.start()
    ready(runner, 1)
    with redis.Redis.from_url(redis_url) as client, ThreadPoolExecutor(2) as pool:
        busy = pool.submit(runner.segment, click("sleep:1"), deadline_s=30)
        until(lambda: carried(runner))
        answer = pool.submit(runner.segment, click("a"), deadline_s=30)
        until(lambda: client.lpop("rq:queue:interactive"))
        assert answer.result().area == 7
        assert busy.result().area == 7


def test_sigterm_finishes_the_running_job(runner: RqRunner, workers: Workers) -> None:
    process = workers.start()
    ready(runner, 1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(runner.segment, click("sleep:1"), deadline_s=30)
        until(lambda: carried(runner))
        process.terminate()
        assert answer.result().area == 7
    assert process.wait(10) == 0
    assert runner.status()["workers"] == []


def test_embeds_are_done_once_and_never_raise(runner: RqRunner, workers: Workers, tmp_path: Path) -> None:
    note = tmp_path / "note"
    job = EmbedJob(images=(ImageRef(url=f"note:{note}"),))
    for _ in range(5):
        runner.embed(job)
    assert runner.status()["queues"]["embed"] == 1
    workers.start()
    until(note.exists)
    until(lambda: not carried(runner))
    assert note.read_text() == "embedded\n"
    runner.embed(EmbedJob(images=tuple(ImageRef(url=str(i)) for i in range(1000))))
    assert runner.status()["queues"]["embed"] == 0


def test_clicks_go_before_images_to_encode(runner: RqRunner, workers: Workers) -> None:
    for i in range(20):
        runner.embed(EmbedJob(images=(ImageRef(url="sleep:0.2", task=i),)))
    workers.start()
    until(lambda: carried(runner))
    assert runner.segment(click("a"), deadline_s=20).area == 7
    assert runner.status()["queues"]["embed"] > 10


def test_a_clock_that_jumps_on_another_machine_fails_no_click(
    runner: RqRunner, workers: Workers, redis_url: str
) -> None:
    """Forward in Redis: all that has a lifetime is gone. Forward in another worker: RQ's clean-up gives up the job."""
    workers.start()
    ready(runner, 1)
    with redis.Redis.from_url(redis_url) as client, ThreadPoolExecutor(2) as pool:
        begun = pool.submit(runner.segment, click("sleep:1.5"), deadline_s=40)
        until(lambda: carried(runner))
        waiting = pool.submit(runner.segment, click("a", 3), deadline_s=40)
        until(lambda: runner.status()["queues"]["interactive"] == 1)
        gone = [name for name in client.scan_iter() if client.pttl(name) > 0]
        assert any(name.startswith(b"rq:job:") for name in gone)
        client.delete(*gone)
        assert (begun.result().area, waiting.result().area) == (7, 3)
        answer = pool.submit(runner.segment, click("sleep:1.5"), deadline_s=40)
        until(lambda: carried(runner))
        started = StartedJobRegistry("interactive", connection=client, serializer=JSONSerializer)
        started.cleanup(timestamp=time.time() + 86400)
        assert answer.result().area == 7
    assert runner.segment(click("next"), deadline_s=10).area == 7


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
    runner = RqRunner(own_redis.url)
    try:
        worker = workers.start()
        failed = refusal(lambda: runner.segment(click("a"), deadline_s=10))
        assert (failed.status, "BALD_SAM_REDIS_URL" in failed.hint) == (503, True)
        runner.embed(EmbedJob(images=(ImageRef(url="x"),)))
        assert "error" in runner.status()
        until(lambda: "Redis does not answer" in workers.logs())
        own_redis.start()
        ready(runner, 1)
        assert runner.segment(click("a"), deadline_s=10).area == 7
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(runner.segment, click("sleep:1"), deadline_s=40)
            until(lambda: carried(runner))
            own_redis.kill()
            restart = threading.Timer(1.0, own_redis.start)
            restart.start()
            assert answer.result().area == 7
            restart.join()
        ready(runner, 1)
        assert runner.segment(click("b"), deadline_s=10).area == 7
        assert worker.poll() is None
        assert workers.logs().count("Redis does not answer") <= 2
    finally:
        workers.stop()
        runner.close()


def test_functions_off_the_list_are_never_imported(
    runner: RqRunner, workers: Workers, redis_url: str, tmp_path: Path
) -> None:
    workers.start()
    ready(runner, 1)
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
    assert runner.segment(click("a"), deadline_s=10).area == 7
