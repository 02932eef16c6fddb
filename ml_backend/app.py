"""The HTTP server that Label Studio talks to."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from flask import Flask, Response, after_this_request, g, has_request_context, jsonify, request
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException

from ml_backend import auth, labeling_config, logs
from ml_backend.answer_json import answer_json
from ml_backend.body import read_json, without_masks
from ml_backend.clicks import AnsweredClick, ClickLog, clock
from ml_backend.clicks.filter import Filter, parse_day
from ml_backend.errors import BackendError, RequestError
from ml_backend.heads_in_use import model_version, model_versions
from ml_backend.learning import Learning
from ml_backend.metrics import Metrics
from ml_backend.model import BaldSamBackend, project_id
from ml_backend.prefetch import Prefetch
from ml_backend.retrieval import Retrieval
from ml_backend.settings import Settings
from ml_backend.status import Recent, Status, add_status

log = logging.getLogger(__name__)

#: Actions that Label Studio sends to /webhook; others are counted together, for whoever calls chooses the name.
ACTIONS = frozenset(
    {
        "ANNOTATION_CREATED",
        "ANNOTATIONS_CREATED",
        "ANNOTATION_UPDATED",
        "ANNOTATIONS_DELETED",
        "TASKS_CREATED",
        "TASKS_DELETED",
        "PROJECT_CREATED",
        "PROJECT_UPDATED",
        "PROJECT_DELETED",
        "START_TRAINING",
    }
)

#: An event of so many bytes is read after it was answered: reading takes about 10 ms a megabyte.
LARGE_EVENT = 1_000_000


def create_app(settings: Settings | None = None, runner: Any = None) -> Flask:
    """The WSGI application. `runner` (see `ml_backend.jobs.runner`) is made from the settings if it is not given."""
    settings = settings or Settings()
    if runner is None:
        from ml_backend.jobs import make_runner

        runner = make_runner(settings)
    metrics = Metrics()
    clicks = ClickLog.from_settings(settings) if settings.click_log else None
    experiment = _AfterTheAnswer(clicks) if clicks is not None else None
    backend = BaldSamBackend(settings=settings, runner=runner, observe=metrics.click, experiment=experiment)
    learning = Learning(settings, runner, engine=clicks.engine if clicks is not None else None)

    retrieval = Retrieval(settings, runner)
    ahead = Prefetch(settings, runner)

    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_request_mb * 1_000_000
    app.extensions["bald_sam_runner"] = runner
    app.extensions["bald_sam_clicks"] = clicks
    app.extensions["bald_sam_learning"] = learning
    app.extensions["bald_sam_retrieval"] = retrieval
    #: Set once the model of this process is loaded.
    ready = app.extensions["bald_sam_ready"] = threading.Event()
    _add_hooks(app, settings, metrics, add_status(app, Status(settings, runner, clicks), metrics))
    _add_events(app, metrics, clicks, learning)
    _add_report(app, clicks)

    @app.get("/")
    def index() -> Response:
        return jsonify(
            name="bald-sam",
            model_version=model_version(settings),
            routes=sorted({r.rule for r in app.url_map.iter_rules()}),
        )

    @app.get("/health")
    def health() -> Response:
        # Label Studio waits one second for this: what is not known at once is not said.
        try:
            status = runner.status()
        except Exception as exc:
            log.warning("the runner gives no status: %s", exc)
            status = {}
        return jsonify(
            status="UP",
            model_class=type(backend).__name__,
            model_version=model_version(settings),
            ready=ready.is_set() or _has_worker(status),
        )

    @app.post("/setup")
    def setup() -> Response:
        body = read_json(request.get_data())
        # A refusal here is what Label Studio shows under Settings > Model; later errors it only logs.
        config = labeling_config.parse(body.get("schema") or "")
        project = project_id(body.get("project"))
        for warning in config.warnings:
            log.warning("project %s: %s", project, warning)
        return jsonify(model_version=model_version(settings, project), warnings=list(config.warnings))

    @app.post("/predict")
    def predict() -> Response:
        body = read_json(without_masks(request.get_data()))
        params = body.get("params") or {}
        if not isinstance(params, dict):
            raise RequestError("`params` must be an object.", "Send the context as `params.context`.")
        context, label_config = params.get("context"), body.get("label_config") or ""
        results: list[Any] = backend.predict(
            body.get("tasks") or [], context=context, label_config=label_config, project=body.get("project")
        )
        tasks = body["tasks"]
        project = project_id(body.get("project")) or project_id(tasks[0].get("project"))
        if len(tasks) == 1:
            ahead.seen(tasks[0], labeling_config.parse(label_config), project)
        if context is None:  # a task was opened, or predictions are to be retrieved: its masks may be prompts
            results = retrieval.predict(read_json(request.get_data())["tasks"], label_config, project)
        return answer_json(results)

    @app.get("/jobs")
    def jobs() -> Response:
        return jsonify(jobs=retrieval.jobs())

    @app.get("/versions")
    def versions() -> Response:
        return jsonify(versions=model_versions(settings))

    return app


def _add_events(app: Flask, metrics: Metrics, clicks: ClickLog | None, learning: Learning) -> None:
    def take_event(content: bytes) -> None:
        body = read_json(content)
        action = body.get("action")
        known = action if isinstance(action, str) and action in ACTIONS else "other"
        project = body.get("project")
        log.info("event %s, project %s", known, project.get("id") if isinstance(project, dict) else None)
        metrics.events.labels(known).inc()
        if clicks is not None:
            clicks.webhook(body)
        learning.webhook(body)

    large_events = ThreadPoolExecutor(1, "webhook")

    @app.post("/webhook")
    def webhook() -> tuple[Response, int]:
        # Label Studio waits one second, and without Redis of its own it holds up the annotator's submit for it.
        content = request.get_data()
        if len(content) < LARGE_EVENT:
            take_event(content)
        else:  # an annotation with hundreds of masks takes a while to be read
            large_events.submit(take_event, content).add_done_callback(_complain)
        return jsonify(status="received"), 201

    @app.get("/training")
    def training() -> Response:
        return jsonify(projects={number: one.model_dump(mode="json") for number, one in learning.records().items()})


def _complain(event: Future[None]) -> None:
    if (error := event.exception()) is not None:
        log.warning("a large event could not be read: %s", error)


class _AfterTheAnswer:
    """The click log, told of each click when the answer to it has left. Outside of a request it is told at once."""

    def __init__(self, clicks: ClickLog) -> None:
        self._clicks = clicks
        self.arm = clicks.arm

    def answered(self, click: AnsweredClick) -> None:
        if not has_request_context():
            self._clicks.answered(click)
            return

        @after_this_request
        def log_when_sent(response: Response) -> Response:
            response.call_on_close(lambda: self._clicks.answered(replace(click, answered=clock.now())))
            return response


def _add_report(app: Flask, clicks: ClickLog | None) -> None:
    one_at_a_time = threading.Lock()  # a large log takes seconds

    @app.get("/report")
    def report() -> Response:
        if clicks is None:
            raise RequestError("Clicks are not logged here.", "Set BALD_SAM_CLICK_LOG=on.", status=404)
        try:
            projects = [project_id(value) for value in request.args.getlist("project")]
            if None in projects:
                raise ValueError("a project is a number")
            since, until = (
                parse_day(value) if (value := request.args.get(name)) else None for name in ("since", "until")
            )
        except ValueError as exc:
            raise RequestError(
                f"The report cannot be chosen so: {exc}.", "Ask /report?project=3&since=2026-11-01&until=2026-12-01."
            ) from exc
        try:
            with one_at_a_time:
                page = clicks.report(Filter(tuple(filter(None, projects)), since, until))
        except SQLAlchemyError as exc:
            log.warning("no report: %s", exc)
            raise BackendError(
                "The database of the click log does not answer.", "Clicks are kept; try again later.", status=503
            ) from exc
        return Response(page, content_type="text/html; charset=utf-8")


def _has_worker(status: dict[str, Any]) -> bool:
    """Whether a click would find a loaded model."""
    return any(worker.get("state") == "ready" for worker in status.get("workers", ()))


#: Pages of ours run no scripts, load nothing and are shown in no frame; nothing is kept on the way.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def _add_hooks(app: Flask, settings: Settings, metrics: Metrics, recent: Recent) -> None:
    @app.before_request
    def admit() -> None:
        g.id = secrets.token_hex(6)
        g.started = time.perf_counter()
        logs.bind(fresh=True, request=g.id)
        if request.path != "/health" and not auth.allowed(settings, request.authorization):
            raise BackendError(
                "Credentials are missing or wrong.",
                "In Label Studio give user and password under Settings > Model; scripts send a bearer token.",
                status=401,
            )
        if request.method == "POST" and "Origin" in request.headers:
            # Label Studio's server sends none. A page elsewhere, with the password that a browser remembers, does.
            raise BackendError(
                "A web page may not send anything here.", "Only Label Studio's server and scripts do.", status=403
            )

    @app.after_request
    def account(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "other"
        seconds = time.perf_counter() - g.get("started", time.perf_counter())
        metrics.request(route, response.status_code, seconds)
        level = logging.DEBUG if route in {"/health", "/metrics", "/status"} else logging.INFO
        log.log(level, "%s %s %d %.0f ms", request.method, route, response.status_code, seconds * 1000)
        response.headers["X-Request-Id"] = g.id
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.errorhandler(Exception)
    def refuse(exc: Exception) -> Response:
        status, error, hint = _words(exc)
        if status >= 500 and not _is_spoken(exc):
            log.error("%s failed, id %s", request.path, g.id, exc_info=exc)
        else:
            log.warning("%s refused: %d %s %s, id %s", request.path, status, error, hint, g.id)
        if status not in (401, 404, 405, 409):
            recent.add(request.url_rule.rule if request.url_rule else "other", status, f"{error} {hint}", g.id)
        response = jsonify(error=error, hint=hint, id=g.id)
        # Of an error answer Label Studio shows nothing but this line.
        response.status = f"{status} {_one_line(error + ' ' + hint)}"
        if status == 401:
            response.headers["WWW-Authenticate"] = 'Basic realm="bald-sam"'
        if status == 503:
            response.headers["Retry-After"] = str(getattr(exc, "retry_after", None) or 2)
        return response


def _words(exc: Exception) -> tuple[int, str, str]:
    """Status, error and hint of whatever was raised, without anything from inside the program."""
    if isinstance(exc, HTTPException):
        status = exc.code or 500
        if status == 413:
            return status, "The request is too large.", "Raise BALD_SAM_MAX_REQUEST_MB or submit the annotation first."
        return status, f"{exc.name}: {request.method} {request.path}", "GET / lists the routes."
    if isinstance(exc, ValidationError):
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return 422, f"The request holds an impossible value ({where}: {first['msg']}).", "Correct it and send it again."
    if _is_spoken(exc):
        return exc.status, exc.error, exc.hint  # type: ignore[attr-defined]
    return 500, "Something went wrong inside bald-sam.", "Look for this id in its log, and report it if it comes back."


def _is_spoken(exc: Exception) -> bool:
    """Whether `exc` explains itself: BackendError and the runners' JobFailed."""
    return all(hasattr(exc, name) for name in ("status", "error", "hint"))


def _one_line(text: str) -> str:
    """`text` as an HTTP reason phrase: printable ASCII, not too long."""
    return " ".join("".join(c if " " <= c <= "~" else " " for c in text).split())[:300]
