"""The images that an annotator will see next, encoded before they are opened."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any

import requests

from ml_backend.errors import BackendError, RequestError
from ml_backend.jobs.runner import Runner
from ml_backend.label_studio_api import LabelStudioApi, LabelStudioError, api_from, where
from ml_backend.labeling_config import LabelingConfig
from ml_backend.settings import Settings
from ml_backend.task_image import image_of
from worker.contract import EmbedJob, ImageRef

log = logging.getLogger(__name__)

#: Tasks that were opened and whose followers are still to be asked for; more annotators than that wait for none.
MAX_WAITING = 64
#: Projects whose last task is remembered.
MAX_PROJECTS = 1000
UNCERTAINTY = "Uncertainty sampling"


class Prefetch:
    """Asks Label Studio, from a thread of its own, which tasks come after one that was opened or clicked on."""

    def __init__(self, settings: Settings, runner: Runner, api: LabelStudioApi | None = None) -> None:
        self._count, self._runner = settings.prefetch, runner
        if api is None and settings.label_studio_url and settings.label_studio_api_key:
            api = api_from(settings)
        self._api = api
        self._queue: queue.Queue[tuple[int, int, LabelingConfig] | None] = queue.Queue(MAX_WAITING)
        self._last: dict[int, int] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def seen(self, task: Mapping[str, Any], config: LabelingConfig, project: int | None) -> None:
        """Somebody has this task before them. Returns at once, raises nothing."""
        number = task.get("id")
        if self._api is None or project is None or not isinstance(number, int) or self._count < 1:
            return
        with self._lock:
            if self._last.get(project) == number:
                return
            if len(self._last) >= MAX_PROJECTS:
                self._last.clear()
            self._last[project] = number
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait((project, number, config))
        except queue.Full:
            log.debug("too many tasks were opened at once; one is not followed up")

    def close(self) -> None:
        """Take no more."""
        self._count = 0

    def _run(self) -> None:
        while True:
            found = self._queue.get()
            if found is None:
                return
            try:
                images = self.following(*found)
                if images:
                    self._runner.embed(EmbedJob(images=tuple(images)))
            except (LabelStudioError, requests.RequestException, BackendError, KeyError) as error:
                log.info("the next tasks of project %d are not encoded ahead: %s", found[0], error)

    def following(self, project: int, task: int, config: LabelingConfig) -> list[ImageRef]:
        """Images of the tasks that Label Studio gives out after `task`: in the order of their ids, or by uncertainty
        where the project says so. (With uniform sampling nobody knows.) Tasks that are annotated are passed over."""
        assert self._api is not None
        open_tasks = where("total_annotations", "equal", 0)
        if self._api.project(project).get("sampling") == UNCERTAINTY:
            found = list(
                self._api.tasks(
                    project,
                    regions=False,
                    filters=[open_tasks],
                    ordering="tasks:predictions_score",
                    limit=self._count + 1,
                )
            )
        else:
            later = [open_tasks, where("id", "greater", task)]
            found = list(self._api.tasks(project, regions=False, filters=later, limit=self._count))
        images = []
        for one in [one for one in found if one["id"] != task][: self._count]:
            try:
                images.append(image_of(one, config, project))
            except RequestError as error:
                log.debug("task %s is not encoded ahead: %s", one["id"], error)
        return images
