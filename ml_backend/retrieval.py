"""*Retrieve Predictions* of the Data Manager: what fits the time is answered, the rest is done behind it and pushed.

Label Studio sends all chosen tasks in one request, waits 100 s, and stores what is answered. An answer without a
prediction for a task is allowed, so the tasks that there is no time for get none. A journal, begun with the request,
holds them all; a thread does what was not answered as `bald-sam prelabel --tasks` would, and later looks whether Label
Studio has stored what was answered, in this process or, after a kill, in the next one.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from pathlib import Path
from typing import Any

import requests

from ml_backend import labeling_config
from ml_backend.errors import BackendError, RequestError
from ml_backend.heads_in_use import model_version
from ml_backend.jobs.failures import JobFailed
from ml_backend.label_studio_api import LabelStudioApi, LabelStudioError, api_from
from ml_backend.prelabel.batch import Answer, Batch
from ml_backend.prelabel.journal import Journal, JournalInUse, read_journal
from ml_backend.prelabel.project import ProjectRun, prelabel_project
from ml_backend.prelabel.results import controls_of, prediction
from ml_backend.prelabel.task_prompts import AUTO, TaskPrompts
from ml_backend.settings import Settings
from worker.contract import PrelabelFailure, PrelabelItem, PrelabelOptions

log = logging.getLogger(__name__)

#: Images that are asked for at a time within the request, and the share of the time left that they are to take.
GROUP = 32
SHARE = 0.7
#: A job that could not go on is tried again after this time, seconds.
AGAIN_S = 15.0
#: Finished jobs are listed for this time, seconds.
LISTED_S = 7 * 24 * 3600
#: Label Studio has this time to store what was answered before it is looked for, seconds.
STORED_S = 30.0
FINISHED, ANSWERED = "finished", "answered"


class Retrieval:
    """All retrievals of one server. All methods may be called from many threads."""

    def __init__(self, settings: Settings, batch: Batch, api: LabelStudioApi | None = None) -> None:
        self._settings, self._batch = settings, batch
        self._folder = settings.data_dir / "prelabel"
        self._options = PrelabelOptions(strategy=settings.strategy)
        self._prompts = TaskPrompts(settings.retrieve if settings.retrieve != "off" else AUTO)
        if api is None and settings.label_studio_url and settings.label_studio_api_key:
            api = api_from(settings)
        self._api = api
        self._groups = ThreadPoolExecutor(8, "retrieval-group")
        self._wake, self._stop = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        #: What keeps a job from going on, by its name.
        self._trouble: dict[str, str] = {}

    def start(self) -> None:
        """Go on with what an earlier process left, and take more; harmless when it has begun."""
        with self._lock:
            if self._thread is None and self._api is not None:
                self._thread = threading.Thread(target=self._run, name="retrieval", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Take nothing more. What is under way is not waited for; the next process goes on with it."""
        self._stop.set()
        self._wake.set()
        self._groups.shutdown(wait=False, cancel_futures=True)

    def predict(
        self, tasks: Sequence[Mapping[str, Any]], label_config: str, project: int | None
    ) -> list[list[dict[str, Any]]]:
        """For each task a list with its prediction, or an empty one: it comes later, or there is nothing to predict.

        A single task is one that was opened, most often: it is only pre-labelled from prompts that came with it, when
        nobody has annotated it, for an annotator waits. Raises ConfigError.
        """
        if self._settings.retrieve == "off":
            return [[] for _ in tasks]
        deadline = time.monotonic() + self._settings.retrieve_budget_s
        version = model_version(self._settings, project)
        config = labeling_config.parse(label_config)
        controls = controls_of(label_config, config, polygons=False)
        found: dict[str, list[dict[str, Any]]] = {}
        failed: dict[str, str] = {}
        items: list[PrelabelItem] = []
        promised = self._promised(project, version)
        for task in tasks:
            if task.get("id") in promised:
                continue
            try:
                item = self._prompts.item(task, config, project or 0)
            except RequestError as error:
                failed[str(task.get("id"))] = str(error)
                continue
            if item is not None and (len(tasks) > 1 or (item.objects and not task.get("annotations"))):
                items.append(item)
        journal = self._begin(project, version, items) if len(tasks) > 1 else None
        try:
            for answer in self._within(deadline, items):
                if isinstance(answer, PrelabelFailure):
                    failed[answer.key] = f"{answer.error} {answer.hint}".strip()
                else:
                    found[answer.key] = [prediction(answer, controls, version)]
        except JobFailed as error:
            log.warning("project %s: predictions are not retrieved now: %s", project, error)
        if journal is not None:
            self._hand_over(journal, found, failed)
        elif (rest := len(items) - len(found) - len(failed)) > 0:
            log.warning(
                "%d predictions do not fit the time; set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY so that they can be "
                "pushed later, or use `bald-sam prelabel --project`",
                rest,
            )
        return [found.get(str(task.get("id")), []) for task in tasks]

    def jobs(self) -> list[dict[str, Any]]:
        """What was left for later, newest first: how far it is, and what failed."""
        found = []
        for path in sorted(self._folder.glob("retrieve-*.jsonl"), reverse=True):
            journal = read_journal(path)
            tasks = journal.header.get("tasks", [])
            done = sum(str(task) in journal.done for task in tasks)
            trouble = self._trouble.get(path.stem)
            state = "finished" if FINISHED in journal.done else "waiting" if trouble else "under way"
            found.append(
                {
                    "job": path.stem,
                    "project": journal.header.get("project"),
                    "model_version": journal.header.get("version"),
                    "started": journal.header.get("started"),
                    "state": state,
                    "tasks": len(tasks),
                    "done": done,
                    "failed": journal.failed,
                    "trouble": trouble,
                }
            )
        return found

    # --- within the request -------------------------------------------------------------------------------------------

    def _within(self, deadline: float, left: list[PrelabelItem]) -> list[Answer]:
        """Answers to as many of `left` as there is time for. Raises JobFailed when there are none at all."""
        answers: list[Answer] = []
        start = 0
        seconds_each: float | None = None
        while start < len(left):
            now = time.monotonic()
            count = 1 if seconds_each is None else min(GROUP, int(SHARE * (deadline - now) / seconds_each))
            if count < 1 or now >= deadline:
                break
            group = left[start : start + count]
            work = self._groups.submit(self._all, group)
            try:
                answers += work.result(timeout=deadline - now)
            except TooLate:
                work.cancel()
                break
            except JobFailed:
                if not answers:
                    raise
                break
            start += len(group)
            seconds_each = (time.monotonic() - now) / len(group)
        return answers

    def _all(self, items: list[PrelabelItem]) -> list[Answer]:
        return list(self._batch.prelabel(items, self._options))

    def _promised(self, project: int | None, version: str) -> set[int]:
        """Tasks that jobs under way will do."""
        found: set[int] = set()
        for path in self._folder.glob(f"retrieve-{project}-*.jsonl"):
            journal = read_journal(path)
            if FINISHED not in journal.done and journal.header.get("version") == version:
                found.update(journal.header.get("tasks", []))
        return found

    def _begin(self, project: int | None, version: str, items: Sequence[PrelabelItem]) -> Journal | None:
        """Note what was asked for, before any of it is done; None where nothing could be pushed later."""
        if project is None or self._api is None or not items:
            return None
        name = f"retrieve-{project}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}.jsonl"
        tasks = [int(item.key) for item in items]
        header = {"project": project, "version": version, "tasks": tasks, "started": time.time()}
        return Journal(self._folder / name).open(header)

    def _hand_over(self, journal: Journal, found: Iterable[str], failed: Mapping[str, str]) -> None:
        """Let the thread do the rest."""
        for key in found:
            journal.add(key, ANSWERED)
        for key, why in failed.items():
            journal.fail(key, why)
        rest = len(journal.header["tasks"]) - len(journal.done) - len(journal.failed)
        journal.close()
        if rest:
            log.info("project %s: %d predictions are pushed later; see /jobs", journal.header["project"], rest)
        self.start()
        self._wake.set()

    # --- behind it ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            for path in sorted(self._folder.glob("retrieve-*.jsonl")):
                if self._stop.is_set():
                    return
                try:
                    self._do(path)
                    self._trouble.pop(path.stem, None)
                except JournalInUse:
                    continue  # another server with the same data directory does it
                except (BackendError, JobFailed, LabelStudioError, requests.RequestException, OSError) as error:
                    log.warning("%s does not go on: %s", path.stem, error)
                    self._trouble[path.stem] = str(error)
                except Exception:
                    log.exception("%s does not go on", path.stem)
                    self._trouble[path.stem] = "The reason is in the server's log."
            self._wake.wait(AGAIN_S)
            self._wake.clear()

    def _do(self, path: Path) -> None:
        """One job, if it is not finished. A finished one is forgotten some days later."""
        known, handed_over = read_journal(path), path.stat().st_mtime
        if FINISHED in known.done:
            if time.time() - float(known.done[FINISHED]) > LISTED_S:
                path.unlink(missing_ok=True)
            return
        journal = Journal(path).open()
        try:
            if not journal.header:  # it was killed while it wrote the first line: nothing was promised yet
                path.unlink(missing_ok=True)
                return
            answered = frozenset(int(key) for key, what in journal.done.items() if what == ANSWERED)
            rest = frozenset(journal.header["tasks"]) - answered
            if rest:
                self._prelabel(journal, rest)
            if answered:
                if self._stop.wait(min(STORED_S, max(0.0, handed_over + STORED_S - time.time()))):
                    return
                self._prelabel(journal, answered)
            journal.add(FINISHED, time.time())
        finally:
            journal.close()

    def _prelabel(self, journal: Journal, tasks: frozenset[int]) -> None:
        """Give those of `tasks` a prediction that have none."""
        assert self._api is not None
        run = ProjectRun(
            project=int(journal.header["project"]),
            prompts=self._prompts,
            options=self._options,
            version=str(journal.header["version"]),
            tasks=tasks,
        )
        summary = prelabel_project(self._api, run, self._batch, journal, observe=lambda _: None)
        log.info(
            "%s: %d predictions pushed, %d there, %d failed",
            journal.path.stem,
            summary.done,
            summary.already,
            len(summary.failed),
        )
