from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_backend.app import create_app
from ml_backend.errors import BackendError
from ml_backend.learning import Learning
from ml_backend.settings import Settings
from tests.ml_backend.test_annotations import Studio, annotation, mask, task
from worker.contract import TrainJob, TrainResult


class Trainer:
    """A runner that trains at once, or when it is let."""

    def __init__(self) -> None:
        self.jobs: list[TrainJob] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def train(self, job: TrainJob, progress: Any = None) -> TrainResult:
        self.jobs.append(job)
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        name = f"project-{job.project}-v{len(self.jobs)}"
        return TrainResult(
            project=job.project, head=name, before="shipped", used=True, reason="it is used from now on.", auc=0.8,
            auc_before=0.7, gain=0.1, error=0.01, objects=8, logged=0, held_out=3, images_held_out=3, seconds=1.0,
        )  # fmt: skip


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def studio() -> Studio:
    return Studio(*(task(n, annotation(1, mask(f"{n}"))) for n in range(1, 4)))


@pytest.fixture
def make(settings: Settings, trainer: Trainer, studio: Studio) -> Iterator[Callable[..., Learning]]:
    made = []

    def build(**changes: Any) -> Learning:
        made.append(Learning(settings.model_copy(update=changes), trainer, api=studio))
        return made[-1]

    yield build
    trainer.go.set()
    for one in made:
        one.close()


def started(project: int = 8) -> dict[str, Any]:
    return {"action": "START_TRAINING", "project": {"id": project}}


def submitted(number: int, action: str = "ANNOTATION_CREATED", **changes: Any) -> dict[str, Any]:
    return {"action": action, "annotation": {"id": number, "project": 8, **changes}, "project": {"id": 8}}


def deleted(*numbers: int) -> dict[str, Any]:
    return {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": n} for n in numbers], "project": {"id": 8}}


def test_the_button_trains(make: Any, trainer: Trainer, capture: Any) -> None:
    learning = make()
    learning.webhook(capture("webhook_START_TRAINING"))
    until(learning.is_idle)
    (job,) = trainer.jobs
    assert (job.project, len(job.objects), job.force) == (8, 3, False)
    record = learning.records()[8]
    assert record.state == "done" and "project-8-v1" in record.message and record.result.auc == 0.8


def test_an_event_that_comes_twice_trains_once(make: Any, trainer: Trainer) -> None:
    trainer.go.clear()
    learning = make()
    learning.webhook(started())
    until(lambda: trainer.jobs)
    for _ in range(5):
        learning.webhook(started())
    trainer.go.set()
    until(learning.is_idle)
    assert len(trainer.jobs) == 1
    assert "Nothing has changed" in learning.records()[8].message
    assert learning.records()[8].result is not None


def test_updates_and_deletions_are_learnt(make: Any, trainer: Trainer, studio: Studio) -> None:
    learning = make()
    learning.request(8)
    until(learning.is_idle)
    studio.found = (task(1, annotation(2, mask("1", 4))), task(2, annotation(1, mask("2"))))
    learning.request(8)
    until(learning.is_idle)
    assert [len(job.objects) for job in trainer.jobs] == [3, 2]
    assert trainer.jobs[0].objects[0].mask != next(one for one in trainer.jobs[1].objects if one.region == "1").mask


def test_projects_are_trained_one_after_the_other(make: Any, trainer: Trainer) -> None:
    learning = make()
    for project in (8, 9, 10):
        learning.request(project)
    until(learning.is_idle)
    assert [job.project for job in trainer.jobs] == [8, 9, 10]


def test_what_was_asked_of_a_killed_server_is_done_by_the_next(make: Any, trainer: Trainer, data_dir: Path) -> None:
    trainer.go.clear()
    first = make()
    first.request(8)
    until(lambda: trainer.jobs)
    first.request(9)
    until(lambda: first.records()[8].state == "running")
    first.close()
    second = make()
    second.start()
    until(lambda: len(trainer.jobs) == 2)
    trainer.go.set()
    until(lambda: second.records()[8].state == "done")


def test_a_server_that_is_stopped_does_not_call_its_training_failed(make: Any, trainer: Trainer) -> None:
    trainer.go.clear()
    trainer.error = ValueError("I/O operation on closed file.")
    learning = make()
    learning.request(8)
    until(lambda: trainer.jobs)
    learning.close()
    trainer.go.set()
    until(lambda: not learning._thread or not learning._thread.is_alive())
    assert learning.records()[8].state == "running"


def test_a_training_that_fails_says_why_and_may_be_asked_for_again(make: Any, trainer: Trainer) -> None:
    trainer.error = BackendError("Too few.", "Annotate more.")
    learning = make()
    learning.request(8)
    until(learning.is_idle)
    assert (learning.records()[8].state, learning.records()[8].message) == ("failed", "Too few. Annotate more.")
    trainer.error = None
    learning.request(8)
    until(learning.is_idle)
    assert learning.records()[8].state == "done"


def test_without_the_address_of_label_studio_it_says_what_to_set(settings: Settings, trainer: Trainer) -> None:
    learning = Learning(settings, trainer)
    learning.request(8)
    until(learning.is_idle)
    assert "LABEL_STUDIO_API_KEY" in learning.records()[8].message
    learning.close()


@pytest.mark.parametrize("number", [float("inf"), float("nan"), None, "x", [], 10**400])
def test_an_event_that_names_no_annotation_is_passed_over(make: Any, trainer: Trainer, number: Any) -> None:
    learning = make(train_after=1)
    learning.webhook(submitted(number))
    learning.webhook({"action": "START_TRAINING", "project": {"id": number}})
    learning.webhook({"action": "ANNOTATIONS_DELETED", "annotations": [{"id": number}], "project": {"id": 8}})
    until(learning.is_idle)


def test_training_by_itself_counts_annotations_not_events(make: Any, trainer: Trainer) -> None:
    learning = make(train_after=3)
    for event in (submitted(1), submitted(1), submitted(1, "ANNOTATION_UPDATED"), submitted(2)):
        learning.webhook(event)
    learning.webhook(submitted(3, was_cancelled=True))
    learning.webhook(deleted(2))
    learning.webhook(deleted(2, 99))
    learning.webhook(submitted(4))
    until(learning.is_idle)
    assert not trainer.jobs and learning.records()[8].changed == {1, 4}
    learning.webhook(submitted(5))
    until(lambda: trainer.jobs and learning.is_idle())
    assert learning.records()[8].changed == set()


def test_any_order_of_events_ends_alike(make: Any, trainer: Trainer) -> None:
    events = [submitted(1), submitted(2), submitted(1, "ANNOTATION_UPDATED"), started()]
    for number, order in enumerate(itertools.permutations(events)):
        learning = make(data_dir=make().__dict__["_folder"].parent / str(number))
        for event in order:
            learning.webhook(event)
        until(learning.is_idle)
        assert learning.records()[8].state == "done"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"action": None},
        {"action": "START_TRAINING"},
        {"action": "START_TRAINING", "project": 7},
        {"action": "ANNOTATION_CREATED", "annotation": {"id": "x"}, "project": {"id": 8}},
        {"action": "ANNOTATIONS_DELETED", "project": {"id": 8}, "annotations": [{}]},
        {"action": ["START_TRAINING"], "project": {"id": 8}},
    ],
)
def test_nonsense_is_harmless(make: Any, body: dict[str, Any]) -> None:
    learning = make(train_after=1)
    learning.webhook(body)
    assert learning.is_idle()


def test_a_damaged_record_is_begun_anew(make: Any, trainer: Trainer, settings: Settings) -> None:
    (settings.data_dir / "learning").mkdir(parents=True)
    (settings.data_dir / "learning" / "8.json").write_text("{")
    learning = make()
    learning.request(8)
    until(lambda: trainer.jobs and learning.is_idle())


def test_the_webhook_answers_while_everything_behind_it_hangs(settings: Settings, runner: Any, capture: Any) -> None:
    hanging = threading.Event()
    runner.train = lambda job, progress=None: hanging.wait(20)
    app = create_app(settings, runner)
    learning = app.extensions["bald_sam_learning"]
    learning._api = Studio()
    studio_hangs = threading.Event()
    learning._api.project = lambda project: studio_hangs.wait(20)
    client = app.test_client()
    slowest = 0.0
    for _ in range(20):
        for name in ("START_TRAINING", "ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"):
            began = time.perf_counter()
            assert client.post("/webhook", json=capture(f"webhook_{name}")).status_code == 201
            slowest = max(slowest, time.perf_counter() - began)
    print(f"slowest webhook: {1000 * slowest:.1f} ms")
    until(lambda: learning.records()[8].state == "running")
    assert client.get("/training").get_json()["projects"]["8"]["state"] == "running"
    studio_hangs.set()
    hanging.set()
    learning.close()


def test_a_large_event_is_read_after_its_answer(settings: Settings, runner: Any, capture: Any) -> None:
    app = create_app(settings.model_copy(update={"train_after": 100}), runner)
    body = capture("webhook_ANNOTATION_CREATED")
    body["annotation"]["result"][0]["value"]["rle"] = [7] * 1_000_000
    answer = app.test_client().post("/webhook", data=json.dumps(body), content_type="application/json")
    assert answer.status_code == 201
    learning = app.extensions["bald_sam_learning"]
    until(lambda: any(18 in one.changed for one in learning.records().values()))
    learning.close()
