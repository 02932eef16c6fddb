"""What goes on in the service, as /status shows it: JSON for scripts, a page for people, gauges for Prometheus."""

from __future__ import annotations

import logging
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flask import Flask, Response, jsonify, render_template, request

from ml_backend.clicks import ClickLog
from ml_backend.heads_in_use import model_version, reader
from ml_backend.metrics import Metrics
from ml_backend.settings import Settings

log = logging.getLogger(__name__)

#: Refused and failed requests that are remembered.
KEPT = 30
#: A queue of clicks whose oldest is older than this, seconds, keeps annotators waiting.
SLOW_S = 5.0


class Recent:
    """The last requests that were refused or failed, newest first. May be used from many threads."""

    def __init__(self) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def add(self, route: str, status: int, error: str, request_id: str) -> None:
        """Remember one; what is said was said to the client too, so it holds no secret."""
        said = {"time": time.time(), "route": route, "status": status, "error": error[:300], "id": request_id}
        self._kept.appendleft(said)

    def all(self) -> list[dict[str, Any]]:
        """Each with `age_s`, `route`, `status`, `error` and the request's `id`."""
        now = time.time()
        return [{"age_s": round(max(0.0, now - one["time"]), 1)} | one for one in list(self._kept)]


class Status:
    """Asks the runner, the click log and the heads, and puts what they say in one object."""

    def __init__(self, settings: Settings, runner: Any, clicks: ClickLog | None) -> None:
        self._settings, self._runner, self._clicks = settings, runner, clicks
        self._started = time.time()
        self.recent = Recent()

    def snapshot(self) -> dict[str, Any]:
        """Everything, as JSON. Never raises: what does not answer is said to do so in `problems`."""
        try:
            said = self._runner.status()
        except Exception as error:
            log.warning("the runner gives no status: %s", type(error).__name__)
            said = {"error": "The runner gives no status; the reason is in the log."}
        queues = _queues(said)
        workers = said.get("workers", [])
        problems = _problems(said, queues, workers)
        counts = self._clicks.counts if self._clicks is not None else None
        if counts is not None and not counts.database_up:
            problems.append("The database of the click log does not answer. Clicks are kept in files meanwhile.")
        heads = reader(self._settings).in_use().choices
        return {
            "name": "bald-sam",
            "version": _version("bald-sam"),
            "model_version": model_version(self._settings),
            "uptime_s": round(time.time() - self._started, 1),
            "runner": said.get("runner", "unknown"),
            "problems": problems,
            "queues": queues,
            "running": said.get("running", []),
            "workers": workers,
            "heads": {
                scope: {"head": choice.head, "pinned": choice.pinned, "earlier": list(choice.earlier)}
                for scope, choice in sorted(heads.items())
            },
            "click_log": None
            if counts is None
            else {name: getattr(counts, name) for name in ("taken", "written", "dropped", "refused", "database_up")},
            "recent": self.recent.all(),
            "versions": {name: _version(name) for name in ("flask", "waitress", "label-studio-ml", "redis", "rq")},
        }


def add_status(app: Flask, status: Status, metrics: Metrics) -> Recent:
    """/metrics, and /status: a page where a browser asks, JSON for everybody else, or what `?format=html|json` says.

    Returns what wants to be told of refused requests.
    """
    metrics.watch(status.snapshot)

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/status")
    def show_status() -> Response:
        snapshot = status.snapshot()
        wanted = request.args.get("format") or request.accept_mimetypes.best_match(["application/json", "text/html"])
        if wanted not in ("html", "text/html"):
            return jsonify(snapshot)
        return Response(render_template("status.html", s=snapshot), content_type="text/html; charset=utf-8")

    app.add_template_filter(in_words, "in_words")
    app.add_template_filter(in_bytes, "in_bytes")
    return status.recent


def in_words(seconds: float | None) -> str:
    """A length of time: `0.4 s`, `12 s`, `3 min`, `5 h`, `2 days`."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} days"


def in_bytes(count: float | None) -> str:
    """A number of bytes: `12 MB`, `3.4 GB`."""
    if count is None:
        return "–"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _queues(said: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = said.get("jobs", {})
    names = list(said.get("queues", {}))
    carried = [str(one.get("job", "")) for one in said.get("running", [])]
    #: How the ids of a queue's jobs begin, in both runners.
    begins = {"interactive": ("segment-", "interactive:"), "batch": ("prelabel-", "batch:")}
    found = []
    for name in names:
        of_queue = begins.get(name, (f"{name}-", f"{name}:"))
        ended = jobs.get(name, {})
        found.append(
            {
                "name": name,
                "waiting": said["queues"][name],
                "oldest_s": ended.get("oldest_s"),
                "running": sum(job.startswith(of_queue) for job in carried),
                **{outcome: ended.get(outcome, {"count": 0}) for outcome in ("done", "refused", "failed")},
            }
        )
    return found


def _problems(said: dict[str, Any], queues: list[dict[str, Any]], workers: list[dict[str, Any]]) -> list[str]:
    problems = [str(said["error"])] if said.get("error") else []
    served = {queue for worker in workers if worker.get("state") != "failed" for queue in worker.get("queues", ())}
    if not problems and not workers:
        problems.append("No worker is running. Start one with `bald-sam worker`.")
    elif workers and "interactive" not in served and any("queues" in worker for worker in workers):
        problems.append("No worker takes clicks.")
    problems += [f"{worker['name']}: {worker['reason']}" for worker in workers if worker.get("reason")]
    for queue in queues:
        if queue["name"] == "interactive" and (queue["oldest_s"] or 0) > SLOW_S:
            problems.append(f"A click waits for {in_words(queue['oldest_s'])}. More workers, or a GPU, would help.")
        elif queue["waiting"] and workers and queue["name"] not in served and served:
            problems.append(f"Jobs wait in the queue {queue['name']}, and no worker takes them.")
    facts = [worker.get("facts") or {} for worker in workers]
    versions = {
        _version("bald-sam"),
        *(said["versions"]["bald-sam"] for said in facts if "bald-sam" in said.get("versions", ())),
    }
    if len(versions) > 1:
        problems.append(f"Different versions run together: {', '.join(sorted(versions))}.")
    backbones = {said["backbone"] for said in facts if "backbone" in said}
    if len(backbones) > 1:
        problems.append(f"Workers have different backbones: {', '.join(sorted(backbones))}.")
    return problems


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
