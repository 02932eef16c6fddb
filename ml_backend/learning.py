"""Learning from what a project's annotators submit: told by Label Studio's events, done behind them, one at a time.

An event costs one `put` into a queue. What is asked for stands in a file of each project, `data_dir/learning/N.json`,
so a server that was killed goes on with it. An event that comes twice, late or in another order is harmless: what is
learnt from is read from Label Studio when the training begins, and the same masks are not learnt from twice.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Literal

import requests
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from ml_backend.annotations import Gathered, Tasks, gather
from ml_backend.label_studio_api import LabelStudioError, api_from
from ml_backend.settings import Settings
from worker.contract import TrainJob, TrainResult

log = logging.getLogger(__name__)

START_TRAINING = "START_TRAINING"
#: Events that say that there is something to learn from, and those that take it back.
SUBMITTED = frozenset({"ANNOTATION_CREATED", "ANNOTATION_UPDATED"})
DELETED = "ANNOTATIONS_DELETED"
#: Events in memory.
QUEUE_SIZE = 10_000


class Record(BaseModel):
    """What is known of a project: whether training is `asked` for, under way, or how the last one ended.

    `changed`: annotations submitted or changed since the last training began. Times: seconds since 1970.
    """

    state: Literal["idle", "asked", "running", "done", "failed"] = "idle"
    time: float = 0.0
    changed: set[int] = Field(default_factory=set)
    digest: str = ""
    message: str = ""
    result: TrainResult | None = None


class Learning:
    """The training of all projects of one server. All methods are safe in any thread."""

    def __init__(
        self, settings: Settings, runner: Any, *, engine: Engine | None = None, api: Tasks | None = None
    ) -> None:
        self._settings, self._runner, self._engine, self._api = settings, runner, engine, api
        self._folder = settings.data_dir / "learning"
        self._events: Queue[tuple[str, int, list[int]]] = Queue(QUEUE_SIZE)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._busy = False

    def start(self) -> None:
        """Begin, with what an earlier process was asked for; harmless when it has begun. An event starts it too."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="learning", daemon=True)
                self._thread.start()

    def webhook(self, body: Mapping[str, Any]) -> None:
        """Take note of an event of Label Studio. Never blocks, never raises."""
        try:
            event = _event(body)
            if event is None or (event[0] != START_TRAINING and not self._settings.train_after):
                return
            self.start()
            self._events.put_nowait(event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            log.warning("an event is not understood (%s: %s)", type(error).__name__, error)
        except Full:
            log.error("An event was dropped: too many wait.")

    def request(self, project: int) -> None:
        """Train a project, soon."""
        self.webhook({"action": START_TRAINING, "project": {"id": project}})

    def records(self) -> dict[int, Record]:
        """What is known of each project."""
        return {int(path.stem): self._read(int(path.stem)) for path in sorted(self._folder.glob("[0-9]*.json"))}

    def is_idle(self) -> bool:
        """Whether nothing is to be done."""
        with self._lock:
            waiting = self._busy or self._events.unfinished_tasks
        return not waiting and all(one.state not in ("asked", "running") for one in self.records().values())

    def close(self) -> None:
        """Take no more events. What runs is not waited for; the next process goes on with it."""
        self._stop.set()

    # --- thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        for project, record in self.records().items():
            if record.state == "running":
                self._write(project, record.model_copy(update={"state": "asked"}))
        while not self._stop.is_set():
            try:
                self._note(*self._events.get(timeout=0.2))
                self._events.task_done()
                continue
            except Empty:
                pass
            except OSError as error:
                self._events.task_done()
                log.error("What is to be learnt cannot be noted: %s", error)
                continue
            asked = sorted(
                (record.time, number) for number, record in self.records().items() if record.state == "asked"
            )
            if asked:
                with self._lock:
                    self._busy = True
                try:
                    self._train(asked[0][1])
                except OSError as error:
                    log.error("What was learnt cannot be noted: %s", error)
                    self._stop.wait(5.0)
                with self._lock:
                    self._busy = False

    def _note(self, action: str, project: int, annotations: list[int]) -> None:
        record = self._read(project)
        changed = set(record.changed)
        if action in SUBMITTED:
            changed |= set(annotations)
        elif action == DELETED:
            changed -= set(annotations)
        asked = action == START_TRAINING or 0 < self._settings.train_after <= len(changed)
        update: dict[str, Any] = {"changed": changed}
        if asked and record.state != "asked":
            log.info("training of project %d was asked for", project)
            update |= {"state": "asked", "time": time.time()}
        if changed != record.changed or "state" in update:
            self._write(project, record.model_copy(update=update))

    def _train(self, project: int) -> None:
        before = self._read(project)
        running = before.model_copy(update={"state": "running", "time": time.time(), "changed": set()})
        self._write(project, running)
        try:
            gathered = self._gather(project)
            if gathered.digest == before.digest:
                self._end(project, running, state="done", message="Nothing has changed since the last training.")
                return
            log.info(
                "project %d: %d masks on %d images, %d of them to learn from",
                project, gathered.masks, gathered.images, len(gathered.objects),
            )  # fmt: skip
            result = self._runner.train(TrainJob(project=project, objects=gathered.objects))
        except Exception as error:
            if self._stop.is_set():  # the runner was closed under it: the next process goes on with it
                return
            spoken = hasattr(error, "hint") or isinstance(error, LabelStudioError | requests.RequestException)
            log.error("project %d was not trained: %s", project, error, exc_info=None if spoken else error)
            self._end(project, running, state="failed", message=str(error)[:1000])
        else:
            message = f"{result.head}: {result.reason}"
            self._end(project, running, state="done", message=message, digest=gathered.digest, result=result)

    def _gather(self, project: int) -> Gathered:
        api = self._api or api_from(self._settings)
        try:
            return gather(api, project, engine=self._engine)
        except SQLAlchemyError as error:
            log.warning("the click log cannot be read (%s): sessions are simulated", type(error).__name__)
            return gather(api, project)

    def _end(self, project: int, running: Record, **update: Any) -> None:
        log.info("project %d: %s", project, update["message"])
        self._write(project, running.model_copy(update={"time": time.time(), **update}))

    # --- files --------------------------------------------------------------------------------------------------------

    def _read(self, project: int) -> Record:
        try:
            return Record.model_validate_json(self._path(project).read_bytes())
        except FileNotFoundError:
            return Record()
        except (OSError, ValidationError) as error:
            log.warning("%s cannot be read: %s", self._path(project), error)
            return Record()

    def _write(self, project: int, record: Record) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path(project).with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
        temporary.replace(self._path(project))

    def _path(self, project: int) -> Path:
        return self._folder / f"{project}.json"


def _event(body: Mapping[str, Any]) -> tuple[str, int, list[int]] | None:
    """(action, project, annotations) of an event that is of interest."""
    action = body.get("action")
    if action == START_TRAINING:
        return START_TRAINING, int(body["project"]["id"]), []
    if action in SUBMITTED:
        annotation = body["annotation"]
        if annotation.get("was_cancelled"):
            return None
        project = annotation.get("project") or body["project"]["id"]
        return str(action), int(project), [int(annotation["id"])]
    if action == DELETED:
        return DELETED, int(body["project"]["id"]), [int(one["id"]) for one in body.get("annotations") or []]
    return None
