"""Predictions into Label Studio, each task exactly one of a model version, whatever is killed and whenever.

Label Studio has no "create if it is not there", so there are three steps: ask what is there before (`tasks_with`), send
in batches and ask again when an answer is lost (`Uploader`), and look for doubles afterwards (`settle`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import requests

from ml_backend.errors import BackendError
from ml_backend.label_studio_api import LabelStudioApi, LabelStudioError, where
from ml_backend.prelabel.results import VERSION_PREFIX

log = logging.getLogger(__name__)

#: Predictions in one request, and how long the first of them waits for more, seconds.
BATCH = 16
WAIT_S = 0.5
#: Predictions that may wait to be sent: then whoever makes them waits.
MAX_WAITING = 64
#: A Label Studio that does not answer is tried again after these seconds.
RETRY_AFTER_S = (1.0, 5.0, 15.0, 30.0, 60.0)


def tasks_with(api: LabelStudioApi, project: int, version: str) -> set[int]:
    """Ids of the tasks that have a prediction of this version."""
    return {task["id"] for task in _predicted(api, project, version) if version in _versions(task)}


def settle(api: LabelStudioApi, project: int, version: str, tasks: Collection[int], *, replace: bool) -> int:
    """Leave each of `tasks` one prediction of `version`, the oldest, and with `replace` none of our other versions.

    Returns how many predictions were deleted. Tasks without a prediction of `version` keep what they have.
    """
    deleted = 0
    for task in _predicted(api, project, VERSION_PREFIX):
        versions = _versions(task)
        if task["id"] not in tasks or version not in versions:
            continue
        others = replace and any(one != version and one.startswith(VERSION_PREFIX) for one in versions)
        if not others and task.get("total_predictions", 0) <= len(versions):
            continue
        kept = False
        for prediction in api.predictions(task["id"]):
            mine = prediction["model_version"] == version
            old = str(prediction["model_version"] or "").startswith(VERSION_PREFIX) and not mine
            if (mine and kept) or (replace and old):
                api.delete_prediction(prediction["id"])
                deleted += 1
            kept = kept or mine
    return deleted


def _predicted(api: LabelStudioApi, project: int, version: str) -> Any:
    # `contains` finds longer names, too: whoever asks looks at the names.
    return api.tasks(
        project, regions=False, filters=[where("predictions_model_versions", "contains", [version], "List")]
    )


def _versions(task: Mapping[str, Any]) -> set[str]:
    """The versions of a task's predictions, as the Data Manager lists them."""
    found = task.get("predictions_model_versions") or ""
    return {one.strip() for one in found.split(",")} if isinstance(found, str) else set(found)


class Uploader:
    """Sends predictions from a thread of its own, and says what became of each.

    `done(task)` and `failed(task, why)` are called from that thread. Leaving the `with` block waits until all are sent.
    """

    def __init__(
        self,
        api: LabelStudioApi,
        project: int,
        version: str,
        *,
        done: Callable[[int], None],
        failed: Callable[[int, str], None],
    ) -> None:
        self._api, self._project, self._version = api, project, version
        self._done, self._failed = done, failed
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(MAX_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prelabel-upload", daemon=True)

    def put(self, task: int, prediction: dict[str, Any]) -> None:
        """Send `{"result", "score", "model_version"}` soon. Raises what stopped the sending, if something did."""
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put((task, prediction), timeout=1.0)
            except queue.Full:
                continue
            return

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Also when the run is stopped: what was made is not thrown away.
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=1.0)
            except queue.Full:
                continue
            break
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        try:
            more = True
            while more:
                batch, more = self._next_batch()
                if batch:
                    self._send(batch)
        except BaseException as error:
            self._error = error

    def _next_batch(self) -> tuple[dict[int, dict[str, Any]], bool]:
        """The next predictions by task, and whether more may come."""
        first = self._queue.get()
        if first is None:
            return {}, False
        batch = dict([first])
        until = time.monotonic() + WAIT_S
        while len(batch) < BATCH:
            try:
                following = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if following is None:
                return batch, False
            batch[following[0]] = following[1]
        return batch, True

    def _send(self, batch: dict[int, dict[str, Any]]) -> None:
        """Send a batch. An answer that was lost, or does not say which were refused, is made up for by asking."""
        left = dict(batch)
        for attempt, wait in enumerate((*RETRY_AFTER_S, None)):
            try:
                if attempt:
                    self._confirm(left)
                if left and self._create(left):
                    self._confirm_all(left)
            except (requests.ConnectionError, requests.Timeout) as error:
                if wait is None:
                    raise BackendError(
                        f"Label Studio does not answer ({type(error).__name__}).",
                        "Nothing is lost: the same command goes on when it is back.",
                        503,
                    ) from error
                log.warning("Label Studio does not answer; once more in %g s", wait)
                time.sleep(wait)
            else:
                if left:
                    self._one_by_one(left)
                return

    def _create(self, left: Mapping[int, dict[str, Any]]) -> bool:
        """Send all; whether all were taken."""
        predictions = [{"task": task, **prediction} for task, prediction in left.items()]
        try:
            return self._api.create_predictions(self._project, predictions) == len(left)
        except LabelStudioError as error:
            if error.status is not None and error.status >= 500:
                raise requests.ConnectionError(str(error)) from error
            log.info("a batch of predictions was refused: %s", error)
            return False

    def _confirm_all(self, left: dict[int, dict[str, Any]]) -> None:
        for task in left:
            self._done(task)
        left.clear()

    def _confirm(self, left: dict[int, dict[str, Any]]) -> None:
        """Take out what is there already."""
        for task in list(left):
            try:
                there = any(one["model_version"] == self._version for one in self._api.predictions(task))
            except LabelStudioError as error:
                if error.status is not None and error.status < 500:
                    continue  # the task was deleted: sending it alone will say so
                raise requests.ConnectionError(str(error)) from error
            if there:
                del left[task]
                self._done(task)

    def _one_by_one(self, left: dict[int, dict[str, Any]]) -> None:
        """Find out which prediction Label Studio refuses, and why. It may have taken some."""
        self._confirm(left)
        for task, prediction in left.items():
            try:
                self._api.create_prediction(
                    task, prediction["result"], score=prediction["score"], model_version=prediction["model_version"]
                )
            except LabelStudioError as error:
                gone = error.status == 400 and self._api.task(task) is None
                self._failed(task, "The task was deleted." if gone else str(error))
            else:
                self._done(task)
