"""Pre-labelling the tasks of a Label Studio project."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ml_backend import labeling_config
from ml_backend.errors import RequestError
from ml_backend.label_studio_api import PAGE, LabelStudioApi, where
from ml_backend.labeling_config import LabelingConfig
from ml_backend.prelabel.batch import Batch, Observer, Summary
from ml_backend.prelabel.journal import Journal
from ml_backend.prelabel.results import Controls, controls_of, prediction
from ml_backend.prelabel.task_prompts import TaskPrompts
from ml_backend.prelabel.upload import Uploader, settle, tasks_with
from worker.contract import PrelabelFailure, PrelabelImage, PrelabelItem, PrelabelOptions

#: Tasks that are fetched ahead of the model.
TASKS_AHEAD = 64

T = TypeVar("T")


@dataclass(frozen=True)
class ProjectRun:
    """Tasks of a project to pre-label: of a Data Manager tab (`view`), or `tasks` alone, by id.

    `replace`: predictions of other versions of ours are deleted.
    """

    project: int
    prompts: TaskPrompts
    options: PrelabelOptions
    version: str
    view: int | None = None
    tasks: frozenset[int] | None = None
    unlabelled_tasks: bool = False
    limit: int | None = None
    replace: bool = False
    #: Regions without a label of their own get none, instead of the first of the config.
    unlabelled: bool = False

    def selection(self) -> dict[str, Any]:
        """Arguments of `LabelStudioApi.tasks`."""
        filters = [where("total_annotations", "equal", 0)] if self.unlabelled_tasks else []
        if self.tasks:
            filters.append(where("id", "in", {"min": min(self.tasks), "max": max(self.tasks)}))
        return {"view": self.view, "filters": filters, "limit": self.limit if self.tasks is None else None}


def journal_path(data_dir: Path, project: int, version: str) -> Path:
    """Where the failures of a project's runs are kept, and which process works on it is known."""
    return data_dir / "prelabel" / f"project-{project}-{version}.jsonl"


def prelabel_project(
    api: LabelStudioApi,
    run: ProjectRun,
    batch: Batch,
    journal: Journal,
    *,
    retry_failed: bool = False,
    observe: Observer = print,
) -> Summary:
    """Give each task of a run that has none a prediction of its version. `journal` is open.

    What is done is known from Label Studio itself, so it may be killed anywhere and run again. At the end each task has
    exactly one prediction of the version, and the project shows that version. Raises RequestError, BackendError,
    JobFailed, LabelStudioError.
    """
    project = api.project(run.project)
    config = labeling_config.parse(project["label_config"])
    controls = controls_of(project["label_config"], config, polygons=run.options.polygons)
    chosen = [task for task in api.tasks(run.project, regions=False, **run.selection()) if _is_chosen(task, run)]
    there = tasks_with(api, run.project, run.version)
    summary = Summary(total=len(chosen))
    left: dict[int, dict[str, Any]] = {}
    for task in chosen:
        if task["id"] in there:
            summary.already += 1
        elif str(task["id"]) in journal.failed and not retry_failed:
            summary.failed[str(task["id"])] = journal.failed[str(task["id"])]
        else:
            left[task["id"]] = task
    observe(summary)
    work = _Work(run, controls, config, journal, summary, observe)
    with Uploader(api, run.project, run.version, done=work.done, failed=work.failed) as uploader:
        tasks = fetched_ahead(_with_regions(api, run, left) if run.prompts.needs_regions else left.values())
        for answer in batch.prelabel(work.items(tasks), run.options):
            work.answer(answer, uploader)
    if work.without_prompts:
        summary.notes.append(f"{work.without_prompts} tasks have no prompts ({run.prompts.source}) and were left out.")
    if run.prompts.file is not None:
        summary.notes += run.prompts.file.notes
    settle(api, run.project, run.version, {task["id"] for task in chosen}, replace=run.replace)
    if project.get("model_version") != run.version and summary.done + summary.already:
        api.call("PATCH", f"/api/projects/{run.project}/", json={"model_version": run.version})
    return summary


def _is_chosen(task: Mapping[str, Any], run: ProjectRun) -> bool:
    return run.tasks is None or task["id"] in run.tasks


class _Work:
    """What is known of a run while it is under way. Answers come on one thread, uploads on another."""

    def __init__(
        self,
        run: ProjectRun,
        controls: Controls,
        config: LabelingConfig,
        journal: Journal,
        summary: Summary,
        observe: Observer,
    ) -> None:
        self._run, self._controls, self._config = run, controls, config
        self._journal, self._summary, self._observe = journal, summary, observe
        self._lock = threading.Lock()
        self.without_prompts = 0

    def items(self, tasks: Iterable[Mapping[str, Any]]) -> Iterator[PrelabelItem]:
        """The tasks that have prompts, as the batch wants them."""
        for task in tasks:
            try:
                item = self._run.prompts.item(task, self._config, self._run.project)
            except RequestError as error:
                self.failed(task["id"], str(error))
                continue
            if item is None:
                self.without_prompts += 1
                with self._lock:
                    self._summary.total -= 1
                    self._observe(self._summary)
            else:
                yield item

    def answer(self, answer: PrelabelImage | PrelabelFailure, uploader: Uploader) -> None:
        """Send what was made."""
        if isinstance(answer, PrelabelFailure):
            self.failed(int(answer.key), f"{answer.error} {answer.hint}".strip())
            return
        made = prediction(answer, self._controls, self._run.version, unlabelled=self._run.unlabelled)
        with self._lock:
            self._summary.regions += len(answer.regions)
        uploader.put(int(answer.key), made)

    def done(self, task: int) -> None:
        """Label Studio has the prediction."""
        with self._lock:
            self._summary.done += 1
            self._journal.add(str(task), True)
            self._observe(self._summary)

    def failed(self, task: int, why: str) -> None:
        """The task gets no prediction."""
        with self._lock:
            self._summary.failed[str(task)] = why
            self._journal.fail(str(task), why)
            self._observe(self._summary)


def _with_regions(
    api: LabelStudioApi, run: ProjectRun, left: Mapping[int, Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """The tasks that are left, with what is on them, one page of close ids after the other.

    By id, not by the run's filters: what is annotated meanwhile would move the pages, and tasks would be passed over.
    """
    ids = sorted(left)
    while ids:
        count = sum(one < ids[0] + PAGE for one in ids[:PAGE])
        between = where("id", "in", {"min": ids[0], "max": ids[count - 1]})
        for found in api.tasks(run.project, regions=True, filters=[between]):
            if found["id"] in left:
                yield found
        ids = ids[count:]


def fetched_ahead(source: Iterable[T], count: int = TASKS_AHEAD) -> Iterator[T]:
    """`source`, read up to `count` items ahead by a thread of its own. What it raises is raised here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(count)
    left = threading.Event()

    def read() -> None:
        try:
            for one in source:
                while not left.is_set():
                    try:
                        waiting.put((True, one), timeout=0.5)
                    except queue.Full:
                        continue
                    break
                if left.is_set():
                    return
            end: tuple[bool, Any] = (False, None)
        except BaseException as error:
            end = (False, error)
        while not left.is_set():
            try:
                waiting.put(end, timeout=0.5)
            except queue.Full:
                continue
            return

    threading.Thread(target=read, name="prelabel-tasks", daemon=True).start()
    try:
        while True:
            more, one = waiting.get()
            if not more:
                if one is not None:
                    raise one
                return
            yield one
    finally:
        left.set()
