"""Worker processes of a test, see `queue_worker`, and what its tests say to them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ml_backend.jobs.failures import JobFailed
from ml_backend.jobs.rq_runner import RqRunner
from worker.contract import Click, ImageRef, Prompts, SegmentJob

SCRIPT = Path(__file__).with_name("queue_worker.py")
ROOT = SCRIPT.parents[2]


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


def click(session: str, x: float = 7.0) -> SegmentJob:
    return SegmentJob(
        image=ImageRef(url="a.png"), width=4, height=3, prompts=Prompts(clicks=(Click(x=x, y=1),)), session=session
    )


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def ready(runner: RqRunner, count: int) -> None:
    until(lambda: [worker["state"] for worker in runner.status()["workers"]] == ["ready"] * count)


def carried(runner: RqRunner) -> list[dict[str, Any]]:
    running: list[dict[str, Any]] = runner.status()["running"]
    return running


def refusal(call: Callable[[], Any]) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        call()
    return caught.value
