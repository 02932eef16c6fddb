"""The captured requests of Label Studio 1.23.2, a runner that answers without a model, and one over a real queue."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_backend.jobs.failures import JobFailed
from ml_backend.jobs.rq_runner import RqRunner
from ml_backend.settings import Settings
from tests.ml_backend.jobs.queue_workers import Workers
from worker.brush_rle import encode
from worker.contract import EmbedJob, Proposal, SegmentJob, SegmentResult

CAPTURED = Path(__file__).parent.parent / "fixtures" / "label_studio"


def load_capture(name: str) -> dict[str, Any]:
    """A captured body; those stored with their headers without them."""
    content = json.loads((CAPTURED / f"{name}.json").read_text())
    body: dict[str, Any] = content["body"] if "headers" in content else content
    return body


class FakeRunner:
    """Answers each job with a square around its first prompt, and keeps what it was asked."""

    def __init__(self) -> None:
        self.jobs: list[SegmentJob] = []
        self.embedded: list[EmbedJob] = []
        self.error: Exception | None = None
        self.stopped: str | None = None
        self.lock = threading.Lock()

    def segment(self, job: SegmentJob, *, deadline_s: float) -> SegmentResult:
        import numpy as np

        with self.lock:
            self.jobs.append(job)
        if self.error is not None:
            raise self.error
        mask = np.zeros((min(job.height, 100), min(job.width, 100)), dtype=bool)
        mask[2:5, 2:5] = True
        proposal = Proposal(x=job.width / 4, y=job.height / 2, positive=False, score=0.25, strategy="bald")
        return SegmentResult(
            width=job.width,
            height=job.height,
            rle=encode(mask),
            area=9,
            predicted_iou=0.875,
            proposal=None if self.stopped else proposal,
            stopped=self.stopped,
            model_version="tiny-0123456789ab",
            timings={"decode": 12.0},
        )

    def embed(self, job: EmbedJob) -> None:
        self.embedded.append(job)

    def prelabel(self, items: Any, options: Any) -> Any:
        raise JobFailed("No worker is running.", "Start one with `bald-sam worker`.", 503)

    def status(self) -> dict[str, Any]:
        return {"runner": "fake", "workers": [{"name": "w", "state": "ready"}]}

    def close(self) -> None:
        pass


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Workers]:
    started = Workers(redis_url, tmp_path)
    yield started
    started.stop()


@pytest.fixture
def redis_runner(redis_url: str) -> Iterator[RqRunner]:
    made = RqRunner(redis_url)
    yield made
    made.close()


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


@pytest.fixture
def capture() -> Any:
    return load_capture
