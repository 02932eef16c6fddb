"""`BaldSamBackend`: the model class that Label Studio's ML backend servers run, and our own too.

It fits label-studio-ml 1.0.9 and 2.x. It keeps nothing between two requests: every prompt is in the request, and what
is costly is cached by content behind the runner.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import flask

from ml_backend import labeling_config, logs, prompts, regions
from ml_backend.arms import Arm
from ml_backend.clicks import AnsweredClick, clock, seen_regions
from ml_backend.clicks.record import record, session_key
from ml_backend.errors import RequestError
from ml_backend.heads_in_use import model_version
from ml_backend.labeling_config import LabelingConfig
from ml_backend.settings import Settings
from ml_backend.task_image import image_of
from worker.contract import EmbedJob, SegmentJob, SegmentResult

# label-studio-ml tries `import torch` for its multiprocessing. The web process must not load torch, so for the time of
# this import it looks as if it were not installed.
_hide_torch = "torch" not in sys.modules
if _hide_torch:
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from label_studio_ml.model import LabelStudioMLBase
finally:
    if _hide_torch:
        del sys.modules["torch"]

log = logging.getLogger(__name__)

Observer = Callable[[SegmentJob, SegmentResult], None]


class Experiment(Protocol):
    """Who sees proposals, and who keeps what was clicked; `ml_backend.clicks.ClickLog` is one."""

    def arm(self, project: int, task: int, session: str, user: str | None = None) -> Arm: ...

    def answered(self, click: AnsweredClick) -> None: ...


_lock = threading.Lock()
_shared: tuple[Settings, Any] | None = None
_learning: Any = None


def _shared_runner() -> tuple[Settings, Any]:
    """Settings and runner of this process, made once: other servers make the model anew again and again."""
    global _shared  # noqa: PLW0603
    with _lock:
        if _shared is None:
            from ml_backend.jobs import make_runner

            settings = Settings()
            _shared = settings, make_runner(settings)
        return _shared


def _shared_learning() -> Any:
    """What learns in this process, made once."""
    global _learning  # noqa: PLW0603
    settings, runner = _shared_runner()
    with _lock:
        if _learning is None:
            from ml_backend.learning import Learning

            _learning = Learning(settings, runner)
        return _learning


class BaldSamBackend(LabelStudioMLBase):  # type: ignore[misc]
    """Answers a smart click with a brush mask and a proposed next click."""

    def __init__(
        self,
        *args: Any,
        settings: Settings | None = None,
        runner: Any = None,
        observe: Observer | None = None,
        experiment: Experiment | None = None,
        **kwargs: Any,
    ) -> None:
        """Our own server gives `settings` and `runner`; `observe` is told of each answered click, `experiment` decides
        whether its proposal is shown, and logs it."""
        super().__init__(*args, **kwargs)
        self._own = (settings or Settings(), runner) if runner is not None else None
        self._observe = observe
        self._experiment = experiment

    def predict(self, tasks: list[dict[str, Any]], context: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
        """One answer for each task, `{"result": [...], "score": float, "model_version": str}`.

        `context` None: a task was opened; its image is encoded in the background. Otherwise the prompts of one object.
        `label_config` and `project` may be given; other servers keep the former in the model.
        Raises ConfigError, RequestError, and what the runner raises.
        """
        received = clock.now()
        settings, runner = self._own or _shared_runner()
        tasks = _checked(tasks)
        label_config = kwargs.get("label_config") or _from_request("label_config") or self._label_config_of_setup()
        if not label_config:
            raise RequestError(
                "The request carries no `label_config`.", "Send the labelling config of the project with it."
            )
        config = labeling_config.parse(label_config, prompts.image_name(context))
        project = project_id(kwargs.get("project") or _from_request("project") or tasks[0].get("project"))
        version = model_version(settings, project)
        empty = [{"result": [], "score": 0.0, "model_version": version} for _ in tasks]
        if context is None:
            self._encode_ahead(runner, tasks[: 1 + settings.prefetch], config, project)
            return empty
        session = prompts.parse(context, config, settings.max_prompts)
        if session is None:
            return empty
        if session.width * session.height > settings.max_image_megapixels * 1_000_000:
            raise RequestError(
                f"The image has {session.width} x {session.height} pixels; at most "
                f"{settings.max_image_megapixels} million are read.",
                "Raise BALD_SAM_MAX_IMAGE_MEGAPIXELS or make the image smaller.",
                status=413,
            )
        task = tasks[0]
        region_id = regions.mask_id(project, task["id"], session)
        logs.bind(session=region_id)
        job = SegmentJob(
            image=image_of(task, config, project, session.item_index),
            width=session.width,
            height=session.height,
            prompts=session.prompts,
            session=region_id,
            strategy=settings.strategy,
            propose=config.proposal is not None,
            request=flask.g.get("id") if flask.has_request_context() else None,
        )
        experiment = self._experiment if project is not None and isinstance(task["id"], int) else None
        arm = None
        if experiment is not None and project is not None:
            user, _ = seen_regions(task)
            arm = experiment.arm(project, task["id"], session_key(project, task["id"], session), user)
        started = time.perf_counter()
        try:
            result = runner.segment(job, deadline_s=settings.deadline_s)
        except Exception as exc:
            if experiment is not None and arm is not None:
                failed = record(
                    task, session, job, arm, received=received, answered=clock.now(), head=settings.head, error=str(exc)
                )
                experiment.answered(failed)
            raise
        waited_ms = (time.perf_counter() - started) * 1000
        if self._observe is not None:
            self._observe(job, result)
        visible = result if arm is None or arm.shows else result.model_copy(update={"proposal": None})
        answer = regions.build(visible, session, config, region_id)
        if experiment is not None and arm is not None:
            click = record(
                task,
                session,
                job,
                arm,
                received=received,
                answered=clock.now(),
                head=settings.head,
                result=result,
                answer=answer,
                waited_ms=waited_ms,
            )
            experiment.answered(click)
        empty[0] = {"result": answer, "score": result.predicted_iou, "model_version": result.model_version}
        return empty

    def fit(self, *args: Any, event: str | None = None, data: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Called by other servers with the events of Label Studio: takes note of them, returns an empty dict at once.
        Our own server tells `Learning` itself."""
        event = event or (args[0] if args and isinstance(args[0], str) else None)
        log.info("event %s", event)
        if isinstance(data, dict) and self._own is None:
            _shared_learning().webhook({**data, "action": event})
        return {}

    def _label_config_of_setup(self) -> str | None:
        value = getattr(self, "label_config", None)
        return value if isinstance(value, str) else None

    @staticmethod
    def _encode_ahead(runner: Any, tasks: list[dict[str, Any]], config: LabelingConfig, project: int | None) -> None:
        images = []
        for task in tasks:
            try:
                images.append(image_of(task, config, project))
            except RequestError as exc:
                log.warning("task %s is not encoded ahead: %s", task.get("id"), exc)
        if images:
            try:
                runner.embed(EmbedJob(images=tuple(images)))
            except Exception:
                # Encoding ahead only saves time; the click itself will say what is wrong.
                log.warning("encoding ahead failed", exc_info=True)


def project_id(value: Any) -> int | None:
    """`"11.1795354867"` (id and time of creation, as Label Studio writes it), `"11"` or 11 -> 11."""
    head = str(value).split(".", 1)[0] if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    return int(head) if head.isascii() and head.isdigit() and len(head) < 19 else None


def _checked(tasks: Any) -> list[dict[str, Any]]:
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise RequestError("`tasks` must be a list with at least one task.", "Send the task that was clicked on.")
    kinds = (int, str) if len(tasks) == 1 else (int,)  # several are those of a project, which Label Studio numbers
    for task in tasks:
        if isinstance(task.get("id"), bool) or not isinstance(task.get("id"), kinds):
            raise RequestError("A task has no usable `id`.", "Send the task as Label Studio's API gives it.")
    return tasks


def _from_request(name: str) -> Any:
    """A field of the body: label-studio-ml 1.0.9 does not hand it on, and its model may be another project's."""
    if not flask.has_request_context():
        return None
    body = flask.request.get_json(silent=True)
    return body.get(name) if isinstance(body, dict) else None


def init_app(model_dir: Path, **kwargs: Any) -> flask.Flask:
    """The server of label-studio-ml 1.0.9 with this model.

    By default that server keeps one model for all projects, makes it anew at each /setup, and answers 500 to a click
    that comes between its restart and the next page load. Its older mode, chosen by an empty variable, does none of
    this, but needs a folder.
    """
    os.environ["LABEL_STUDIO_ML_BACKEND_V2"] = ""
    from label_studio_ml.api import init_app as their_init_app

    app: flask.Flask = their_init_app(BaldSamBackend, model_dir=str(model_dir), **kwargs)
    return app
