from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from rq import Queue as RqQueue
from rq.serializers import JSONSerializer

from ml_backend.cli import main
from ml_backend.jobs import rq_runner
from ml_backend.jobs.rq_results import with_mask
from ml_backend.jobs.rq_runner import RqRunner
from tests.ml_backend.jobs.queue_workers import Workers, carried, click, ready, refusal, until
from worker.contract import LARGE_MASK, MASK_KEY, EmbedJob, ImageRef


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


def test_quick_clicks_go_through_one_that_encodes_and_others_wait_for_their_turn(
    redis_runner: RqRunner, workers: Workers
) -> None:
    workers.start()
    ready(redis_runner, 1)
    ended: list[float] = []

    def answer(session: str, x: float) -> float:
        area = redis_runner.segment(click(session, x), deadline_s=20).area
        ended.append(x)
        return area

    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(answer, "encode:1:a", 1)]
        until(lambda: carried(redis_runner))
        for number, session in enumerate(("encode:0.2:b", "encode:0.2:c", "quick", "fail"), 2):
            answers.append(pool.submit(answer, session, number))
            until(
                lambda number=number: 4 in ended or redis_runner.status()["queues"]["interactive"] >= min(number - 1, 2)
            )
        assert answers[3].result() == 4
        assert not answers[0].done()
        assert refusal(answers[4].result).status == 422
        assert [one.result() for one in answers[:3]] == [1, 2, 3]
    assert ended == [4, 1, 2, 3]
    until(lambda: not redis_runner.status()["running"])
    assert redis_runner.status()["queues"]["interactive"] == 0
    assert [redis_runner.status()["jobs"]["interactive"][name]["count"] for name in ("done", "refused")] == [4, 1]


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
