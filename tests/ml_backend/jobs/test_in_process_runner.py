from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ml_backend.jobs import in_process_runner
from ml_backend.jobs.failures import JobFailed
from ml_backend.jobs.in_process_runner import InProcessRunner
from worker import preemption
from worker.contract import Click, EmbedJob, ImageRef, Prompts, RuntimeOptions, SegmentJob


def click(session: str, x: float = 7.0) -> SegmentJob:
    return SegmentJob(
        image=ImageRef(url="a.png"), width=4, height=3, prompts=Prompts(clicks=(Click(x=x, y=1),)), session=session
    )


def refusal(call: Callable[[], Any]) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        call()
    return caught.value


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Job functions that do what the session says, where the runner looks for them."""
    spec = importlib.util.spec_from_file_location("queue_worker", Path(__file__).with_name("queue_worker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tasks, runtime = ModuleType("worker.tasks"), ModuleType("worker.runtime")
    vars(tasks).update(segment=module.segment, embed=module.embed)
    vars(runtime).update(configure=lambda options: vars(module).setdefault("configured", []).append(options))
    vars(runtime).update(loaded=lambda: None)
    monkeypatch.setitem(sys.modules, "worker.tasks", tasks)
    monkeypatch.setitem(sys.modules, "worker.runtime", runtime)
    return module


@pytest.fixture
def runner(functions: ModuleType) -> Iterator[InProcessRunner]:
    made = InProcessRunner(RuntimeOptions(data_dir=Path()), max_waiting=2)
    yield made
    made.close()


def busy(runner: InProcessRunner, pool: ThreadPoolExecutor, seconds: float = 0.6) -> Any:
    future = pool.submit(runner.segment, click(f"sleep:{seconds}"), deadline_s=20)
    until(lambda: runner.status()["running"])
    return future


def test_a_click_is_answered_and_the_worker_configured_once(runner: InProcessRunner, functions: ModuleType) -> None:
    assert [runner.segment(click("a", x), deadline_s=5).area for x in range(3)] == [0, 1, 2]
    assert len(functions.configured) == 1


def test_failures_are_told_in_words(runner: InProcessRunner, caplog: pytest.LogCaptureFixture) -> None:
    failed = refusal(lambda: runner.segment(click("fail"), deadline_s=5))
    assert (failed.error, failed.hint, failed.status) == ("No.", "Try this.", 422)
    failed = refusal(lambda: runner.segment(click("raise"), deadline_s=5))
    assert failed.status == 500
    assert "secret" not in str(failed)
    assert failed.hint.rstrip(".").split()[-1] in caplog.text
    assert runner.segment(click("a"), deadline_s=5).area == 7


def test_an_answer_of_another_shape_is_a_failure(runner: InProcessRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["worker.tasks"], "segment", lambda job: {"kind": "segment"}, raising=True)
    assert refusal(lambda: runner.segment(click("a"), deadline_s=5)).status == 500


def test_a_later_click_drops_the_waiting_one_at_once(runner: InProcessRunner) -> None:
    with ThreadPoolExecutor(4) as pool:
        first = busy(runner, pool)
        older = pool.submit(runner.segment, click("s", 1), deadline_s=20)
        until(lambda: runner.status()["queues"]["interactive"] == 1)
        newer = pool.submit(runner.segment, click("s", 2), deadline_s=20)
        assert refusal(older.result).status == 409
        assert not first.done()
        assert newer.result().area == 2


def test_a_late_click_is_refused_and_never_runs(runner: InProcessRunner) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = busy(runner, pool)
        assert refusal(lambda: runner.segment(click("raise"), deadline_s=0.05)).status == 504
        assert runner.status()["queues"]["interactive"] == 0
        first.result()
    assert runner.segment(click("a"), deadline_s=5).area == 7


def test_what_is_late_is_ended_for_those_who_wait_behind_it(runner: InProcessRunner, functions: ModuleType) -> None:
    ended = threading.Event()

    def endless(job: dict[str, Any]) -> None:
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    segment, tasks = functions.segment, sys.modules["worker.tasks"]
    tasks.segment = lambda job: endless(job) if job["session"] == "endless" else segment(job)  # type: ignore[attr-defined]
    for _ in range(3):
        ended.clear()
        assert refusal(lambda: runner.segment(click("endless"), deadline_s=0.1)).status == 504
        assert ended.wait(10)
        assert runner.segment(click("next"), deadline_s=5).area == 7
    assert runner.status()["jobs"]["interactive"]["failed"]["count"] == 3


def test_the_runner_counts_what_became_of_its_jobs(runner: InProcessRunner) -> None:
    runner.segment(click("a"), deadline_s=5)
    refusal(lambda: runner.segment(click("fail"), deadline_s=5))
    refusal(lambda: runner.segment(click("raise"), deadline_s=5))
    until(lambda: not runner.status()["running"])
    jobs = runner.status()["jobs"]
    assert jobs["embed"] == {"oldest_s": None, **{name: {"count": 0} for name in ("done", "refused", "failed")}}
    ended = jobs["interactive"]
    assert [ended[name]["count"] for name in ("done", "refused", "failed")] == [1, 1, 1]
    assert (ended["refused"]["said"], ended["refused"]["age_s"] < 60) == ("No. Try this.", True)
    assert "secret" not in ended["failed"]["said"]


def test_a_full_queue_says_when_to_come_back(runner: InProcessRunner) -> None:
    with ThreadPoolExecutor(4) as pool:
        busy(runner, pool)
        waiting = [pool.submit(runner.segment, click(f"s{i}"), deadline_s=20) for i in range(2)]
        until(lambda: runner.status()["queues"]["interactive"] == 2)
        failed = refusal(lambda: runner.segment(click("t"), deadline_s=20))
        assert failed.status == 503
        assert failed.retry_after
        assert [future.result().area for future in waiting] == [7, 7]


def test_clicks_go_before_images_which_are_encoded_once(
    runner: InProcessRunner, functions: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    tasks = sys.modules["worker.tasks"]
    segment = functions.segment
    monkeypatch.setattr(tasks, "embed", lambda job: order.append(job["images"][0]["url"]))
    monkeypatch.setattr(tasks, "segment", lambda job: (order.append(job["session"]), segment(job))[1])
    with ThreadPoolExecutor(2) as pool:
        busy(runner, pool, 0.3)
        for _ in range(3):
            runner.embed(EmbedJob(images=(ImageRef(url="one"), ImageRef(url="two"))))
        assert runner.status()["queues"]["embed"] == 2
        assert runner.segment(click("click"), deadline_s=20).area == 7
    until(lambda: len(order) == 4)
    assert order == ["sleep:0.3", "click", "one", "two"]


@pytest.fixture
def log(functions: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in order. Session `encode:0.5:a` encodes for so long as a real one does, in layers."""
    events: list[str] = []
    monkeypatch.setattr(preemption, "ASK_EVERY_S", -1.0)

    def segment(job: dict[str, Any]) -> Any:
        verb, _, rest = job["session"].partition(":")
        if verb == "encode":
            seconds, _, name = rest.partition(":")
            events.append(f"{name} comes")
            preemption.before_long_work()
            end = time.monotonic() + float(seconds)
            try:
                while time.monotonic() < end:
                    preemption.give_way()
                    time.sleep(0.01)
            except BaseException:
                events.append(f"{name} is ended")
                raise
            events.append(f"{name} is encoded")
        else:
            events.append(job["session"])
        return functions.segment({**job, "session": "answer"})

    monkeypatch.setattr(sys.modules["worker.tasks"], "segment", segment)
    return events


def test_quick_clicks_go_through_one_that_encodes_and_others_wait_for_their_turn(
    runner: InProcessRunner, log: list[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(runner.segment, click("encode:0.5:first", 1), deadline_s=20)
        until(lambda: log == ["first comes"])
        second = pool.submit(runner.segment, click("encode:0.1:second", 2), deadline_s=20)
        until(lambda: log[-1] == "second comes")
        assert runner.segment(click("quick", 3), deadline_s=20).area == 3
        assert (first.done(), second.done()) == (False, False)
        assert (runner.status()["queues"]["interactive"], len(runner.status()["running"])) == (1, 1)
        assert (first.result().area, second.result().area) == (1, 2)
    assert log == ["first comes", "second comes", "quick", "first is encoded", "second comes", "second is encoded"]


def test_a_click_that_waits_for_its_turn_is_dropped_for_a_later_one(runner: InProcessRunner, log: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(runner.segment, click("encode:0.3:first", 1), deadline_s=20)
        until(lambda: log == ["first comes"])
        older = pool.submit(runner.segment, click("encode:0.1:same", 2), deadline_s=20)
        until(lambda: log[-1] == "same comes")
        newer = pool.submit(runner.segment, click("encode:0.1:same", 3), deadline_s=20)
        assert refusal(older.result).status == 409
        assert (first.result().area, newer.result().area) == (1, 3)


def test_a_late_click_is_ended_and_not_the_one_in_the_middle_of_it(
    runner: InProcessRunner, log: list[str], functions: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, tasks = threading.Event(), sys.modules["worker.tasks"]
    segment = tasks.segment  # type: ignore[attr-defined]

    def slowly(job: dict[str, Any]) -> Any:
        if job["session"] == "slow":
            slow.set()
            end = time.monotonic() + 0.6
            while time.monotonic() < end:
                time.sleep(0.01)
        return segment(job)

    monkeypatch.setattr(tasks, "segment", slowly)
    with ThreadPoolExecutor(4) as pool:
        late = pool.submit(runner.segment, click("encode:20:late", 1), deadline_s=0.4)
        until(lambda: log == ["late comes"])
        other = pool.submit(runner.segment, click("slow", 2), deadline_s=20)
        assert slow.wait(10)
        assert refusal(late.result).status == 504
        assert other.result().area == 2
        assert runner.segment(click("next", 3), deadline_s=5).area == 3
    assert log == ["late comes", "slow", "late is ended", "next"]


def test_embed_never_raises(runner: InProcessRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process_runner, "MAX_EMBED_WAITING", 3)
    with ThreadPoolExecutor(1) as pool:
        busy(runner, pool, 0.2)
        runner.embed(EmbedJob(images=tuple(ImageRef(url=str(i)) for i in range(10))))
        assert runner.status()["queues"]["embed"] == 3
    runner.close()
    runner.embed(EmbedJob(images=(ImageRef(url="x"),)))


def test_other_functions_are_refused(runner: InProcessRunner) -> None:
    with pytest.raises(ValueError, match=r"os\.system"):
        runner._call("os.system", {})


def test_close_ends_what_waits(runner: InProcessRunner) -> None:
    with ThreadPoolExecutor(2) as pool:
        busy(runner, pool, 0.2)
        waiting = pool.submit(runner.segment, click("a"), deadline_s=20)
        until(lambda: runner.status()["queues"]["interactive"] == 1)
        runner.close()
        assert refusal(waiting.result).status == 503
    assert refusal(lambda: runner.segment(click("b"), deadline_s=5)).status == 503
    until(lambda: all(thread is not runner._thread for thread in threading.enumerate()))
