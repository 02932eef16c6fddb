"""A real Label Studio, a real Chromium, and the backend as its own processes behind a recorder of the traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, Page

from ml_backend import label_studio, processes
from ml_backend.label_studio import LabelStudioServer
from ml_backend.label_studio_api import LabelStudioApi

EMAIL, PASSWORD = "annotator@example.com", "an-annotators-password"
ARTIFACTS = Path(__file__).parents[2] / "artifacts" / "e2e"
COMMAND = Path(sys.executable).with_name("bald-sam")


@dataclass
class Studio:
    """A running Label Studio and its API."""

    url: str
    token: str
    api: LabelStudioApi


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One Label Studio for the whole run: its first start migrates its database."""
    command = label_studio.ensure_environment(label_studio.default_environment(Path.cwd()))
    folder = tmp_path_factory.mktemp("label-studio")
    port = processes.free_port()
    with LabelStudioServer(command, data_dir=folder, port=port, email=EMAIL, password=PASSWORD) as server:
        token = label_studio.personal_access_token(server.url, EMAIL, PASSWORD)
        yield Studio(server.url, token, LabelStudioApi(server.url, token))


# --- the backend and what Label Studio says to it ---------------------------------------------------------------------


@dataclass
class Exchange:
    """One request of Label Studio and the backend's answer."""

    method: str
    path: str
    body: Any
    status: int = 0
    answer: Any = None

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """The prompts of an interactive /predict, in click order."""
        context = ((self.body or {}).get("params") or {}).get("context") or {}
        return [entry for entry in context.get("result", []) if "is_positive" in entry]

    def region(self, kind: str) -> dict[str, Any] | None:
        """The result of this type in the answer to a click."""
        return next((found for found in self.answer["results"][0]["result"] if found["type"] == kind), None)


@dataclass
class Recorder:
    """Stands between Label Studio and the backend, passes everything on and keeps a copy."""

    target: str
    exchanges: list[Exchange] = field(default_factory=list)

    def __post_init__(self) -> None:
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
                exchange = Exchange(self.command, self.path, json.loads(content) if content else None)
                try:
                    answer = requests.request(
                        self.command, recorder.target + self.path, data=content, headers=headers, timeout=120
                    )
                    exchange.status, answered = answer.status_code, answer.content
                except requests.RequestException as error:
                    exchange.status, answered = 502, json.dumps({"error": str(error)}).encode()
                exchange.answer = json.loads(answered) if answered else None
                recorder.exchanges.append(exchange)
                self.send_response(exchange.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answered)))
                self.end_headers()
                self.wfile.write(answered)

            do_GET = do_POST = _pass_on

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def clicks(self) -> list[Exchange]:
        """The answered clicks, in order."""
        return [exchange for exchange in self.exchanges if exchange.path == "/predict" and exchange.prompts]

    def webhooks(self, action: str) -> list[Exchange]:
        """The webhook requests of this action."""
        return [one for one in self.exchanges if one.path == "/webhook" and one.body.get("action") == action]


class Backend:
    """`bald-sam serve`, and with a Redis URL two `bald-sam worker`; each can be killed or restarted."""

    def __init__(self, folder: Path, studio: Studio, redis_url: str | None) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.port = processes.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | {
            "BALD_SAM_DATA_DIR": str(folder / "data"),
            "LABEL_STUDIO_URL": studio.url,
            "LABEL_STUDIO_API_KEY": studio.token,
            "OMP_NUM_THREADS": "2",
        }
        self.server: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        redis = ["--redis-url", self.redis_url] if self.redis_url else []
        self.server = self._run("serve", "--port", str(self.port), *redis)
        if self.redis_url:
            self.workers = [self._run("worker", *redis) for _ in range(2)]
        self._wait_until_up()

    def restart(self) -> None:
        """Stop the web process without warning and start it again, on the same port."""
        assert self.server is not None
        self.server.kill()
        self.server.wait(10)
        redis = ["--redis-url", self.redis_url] if self.redis_url else []
        self.server = self._run("serve", "--port", str(self.port), *redis)
        self._wait_until_up()

    def kill_one_worker(self) -> None:
        """SIGKILL for the first worker."""
        worker = self.workers.pop(0)
        worker.kill()
        worker.wait(10)

    def stop(self) -> None:
        for process in [self.server, *self.workers]:
            if process is not None:
                processes.stop(process)

    def log(self) -> str:
        """What the processes printed, for a failing test."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        number = len(list(self.folder.glob("*.log")))
        log = self.folder / f"{number}-{arguments[0]}.log"
        return processes.start([COMMAND, *arguments], env=self.environment, cwd=self.folder, log=log)

    def _wait_until_up(self) -> None:
        for _ in range(600):
            assert self.server is not None
            assert self.server.poll() is None, f"bald-sam serve ended by itself:\n{self.log()}"
            try:
                if requests.get(f"{self.url}/health", timeout=2).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.2)
        raise AssertionError(f"bald-sam serve does not answer:\n{self.log()}")


# --- the annotator ----------------------------------------------------------------------------------------------------


class Annotator:
    """What a person does in the page, with default user settings. Positions are percent of the image, as in results."""

    def __init__(self, page: Page, studio: Studio, recorder: Recorder, pictures: Path) -> None:
        self.page = page
        self.studio = studio
        self.recorder = recorder
        self.pictures = pictures

    def open(self, project: int, task: int) -> None:
        """Open the deep link of a task, logging in where asked."""
        self.page.goto(f"{self.studio.url}/projects/{project}/data?task={task}")
        if "/user/login" in self.page.url:
            self.page.fill("input[name=email]", EMAIL)
            self.page.fill("input[name=password]", PASSWORD)
            self.page.click("button[type=submit]")
        self.page.wait_for_selector("canvas", timeout=60_000)
        self.page.wait_for_selector("img[src^='blob:']", timeout=60_000)
        self.page.wait_for_timeout(1000)

    def take_the_prompt_tool(self) -> None:
        """Auto-Annotation on, a click beside the image (a focused switch swallows hotkeys), M."""
        self.page.get_by_test_id("bottombar-auto-annotation-toggle").click(force=True)
        self.page.get_by_text("View region details").click()
        self.page.keyboard.press("m")
        self.page.wait_for_timeout(300)

    def click(self, x: float, y: float, *, negative: bool = False) -> Exchange:
        """Click (Alt+click when negative) and wait until the page shows the answer to it."""
        before = len(self.recorder.clicks)
        box = self.page.locator("img[src^='blob:']").bounding_box()
        assert box is not None
        if negative:
            self.page.keyboard.down("Alt")
        self.page.mouse.click(box["x"] + box["width"] * x / 100, box["y"] + box["height"] * y / 100)
        if negative:
            self.page.keyboard.up("Alt")
        self._wait_for(lambda: len(self.recorder.clicks) > before, "no click reached the backend")
        exchange = self.recorder.clicks[-1]
        assert exchange.status == 200, exchange.answer
        mask = exchange.region("brushlabels")
        assert mask is not None, exchange.answer
        self._wait_for(lambda: mask["id"] in self.suggestions(), "the page does not show the mask")
        self.page.wait_for_timeout(700)
        return exchange

    def suggestions(self) -> list[str]:
        """Ids of the suggestions that the page shows now."""
        found: list[str] = self.page.evaluate(
            "[...Htx.annotationStore.selected.suggestions.values()].map(region => region.cleanId)"
        )
        return found

    def regions(self) -> list[dict[str, Any]]:
        """The regions (not the suggestions) of the annotation in the page, as they would be saved."""
        found: list[dict[str, Any]] = self.page.evaluate("Htx.annotationStore.selected.serializeAnnotation()")
        return found

    def accept(self) -> None:
        """The tick in the bottom bar."""
        self.page.locator(".lsf-auto-accept__action_type_accept").click()
        self._wait_for(lambda: not self.suggestions(), "the suggestions stay")
        self.page.wait_for_timeout(500)

    def submit(self) -> None:
        """Submit, and wait until Label Studio has it."""
        self.page.locator("button[name=submit]").click()
        self._wait_for(lambda: bool(self.recorder.webhooks("ANNOTATION_CREATED")), "no webhook after Submit")
        self.page.wait_for_timeout(500)

    def picture(self, name: str) -> None:
        """Screenshot into artifacts/."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def _wait_for(self, condition: Callable[[], bool], complaint: str) -> None:
        for _ in range(600):
            if condition():
                return
            self.page.wait_for_timeout(100)
        self.picture("failure")
        raise AssertionError(complaint)


@pytest.fixture(params=["embedded", "redis"])
def backend(
    request: pytest.FixtureRequest, studio: Studio, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    """The backend, once in one process and once with Redis and two workers."""
    redis_url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    started = Backend(tmp_path_factory.mktemp(request.param), studio, redis_url)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        sys.stdout.write(started.log())


@pytest.fixture
def recorder(backend: Backend) -> Iterator[Recorder]:
    """All that Label Studio says to the backend, and its answers."""
    between = Recorder(backend.url)
    yield between
    between.close()


@pytest.fixture
def annotator(
    browser: Browser, studio: Studio, recorder: Recorder, request: pytest.FixtureRequest
) -> Iterator[Annotator]:
    """A person with a fresh browser profile: no setting was ever changed."""
    context = browser.new_context(viewport={"width": 1400, "height": 860})
    yield Annotator(context.new_page(), studio, recorder, ARTIFACTS / request.node.callspec.id)
    context.close()
