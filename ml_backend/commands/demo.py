"""`bald-sam demo`: Label Studio, a sample project and the embedded backend on this machine, with one command."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType

import click
import requests
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from ml_backend import label_studio, processes
from ml_backend.cli import load_settings
from ml_backend.commands.options import BACKBONE, DEVICE
from ml_backend.demo_pictures import pictures_in, sample_pictures
from ml_backend.demo_project import LABELS, SAMPLES, State, attach, fill, first_open
from ml_backend.label_studio import LabelStudioServer
from ml_backend.label_studio_api import LabelStudioApi, LabelStudioError
from ml_backend.labeling_config import recommended_config
from ml_backend.settings import Settings

console = Console(highlight=False)


@click.command()
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Your own pictures.")
@click.option("--port", default=9090, show_default=True, help="Port of the backend.")
@click.option("--label-studio-port", default=8080, show_default=True, help="Port of Label Studio.")
@BACKBONE
@DEVICE
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Everything is kept here.")
@click.option("--no-browser", is_flag=True, help="Do not open the page.")
@click.option("--reset", is_flag=True, help="Begin anew; what was there is set aside, not deleted.")
def demo(
    images: Path | None,
    port: int,
    label_studio_port: int,
    backbone: str | None,
    device: str | None,
    data_dir: Path | None,
    no_browser: bool,
    reset: bool,
) -> None:
    """Try it: starts Label Studio with a sample project and the backend, and prints one address to open."""
    settings = load_settings(data_dir=data_dir, backbone=backbone, device=device)
    try:
        with contextlib.ExitStack() as running, _stop_signals():
            address, server, backend = _start(running, settings, images, port, label_studio_port, reset=reset)
            if not no_browser and _has_a_screen():
                webbrowser.open(address)
            while server.runs() and backend.runs():
                time.sleep(0.5)
            ended, log = ("The backend", backend.log) if server.runs() else ("Label Studio", server.log)
            raise LabelStudioError(f"{ended} ended by itself: {processes.last_words(log)} (log: {log})")
    except (KeyboardInterrupt, SystemExit):
        console.print("Stopped; nothing is left running. Your annotations are kept for the next start.")
    except (LabelStudioError, OSError) as error:
        raise _Refusal(str(error)) from error
    except ModuleNotFoundError as error:
        raise _Refusal(f"The package {error.name} is missing: pip install 'bald-sam[worker,evaluate]'.") from error


def _has_a_screen() -> bool:
    """Without one, `webbrowser` would start a text browser in this terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class _Refusal(click.ClickException):
    exit_code = 2


def _start(
    running: contextlib.ExitStack, settings: Settings, images: Path | None, port: int, page_port: int, *, reset: bool
) -> tuple[str, LabelStudioServer, Backend]:
    """Start everything, each part stopped by `running`; print what to press; return the address and what runs."""
    home = settings.data_dir.absolute() / "demo"
    _clear_the_way(home, port, page_port, reset=reset)
    running.enter_context(_alone(home))
    pictures = pictures_in(images) if images else sample_pictures(home / "pictures")

    environment = label_studio.default_environment(settings.data_dir.absolute())
    with console.status("Looking for Label Studio") as status:

        def doing(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(f"{text} ...")

        command = label_studio.ensure_environment(environment, doing)
        state = State.load(home / "demo.json")
        state.save()
        server = LabelStudioServer(
            command, data_dir=home / "label-studio", port=page_port, email=state.email, password=state.password
        )
        first = " - the first start prepares its database, about a minute" if server.is_new else ""
        doing(f"Starting Label Studio {label_studio.VERSION}{first}")
        # From the second start on the token is known: the model is loaded while Label Studio starts.
        token = state.token
        backend = Backend(settings, home=home, port=port, label_studio_url=server.url)
        if token:
            running.enter_context(backend.serving(token))
        running.enter_context(server)
        if not token:
            token = state.token = label_studio.personal_access_token(server.url, state.email, state.password)
            state.save()
            running.enter_context(backend.serving(token))
        _done(f"Label Studio {label_studio.VERSION} answers on {server.url}")
        doing("Starting the backend")
        backend.wait()

        doing("Preparing the project")
        api = LabelStudioApi(server.url, token)
        key = str(images.resolve()) if images else SAMPLES
        project = fill(api, state, key, images, pictures)
        for complaint in attach(api, state, key, backend.url, settings):
            console.print(f"[yellow]![/yellow] {complaint}")
        tasks = list(api.tasks(project))
        _done(f"{len(tasks)} pictures in the project")
        doing("Trying a first click")
        backend.try_a_click(tasks[0]["data"]["image"], recommended_config(LABELS))
        _done(f"The backend answers on {backend.url} (backbone {settings.backbone}, device {settings.device})")
        running.callback(console.print, "Stopping ...")
    address = f"{server.url}/projects/{project}/data?task={first_open(tasks)['id']}"
    console.print(_panel(address, state))
    return address, server, backend


def _clear_the_way(home: Path, port: int, page_port: int, *, reset: bool) -> None:
    """Refuse taken ports; with `reset`, set the former demo aside."""
    if port == page_port != 0:
        raise LabelStudioError("Label Studio and the backend need two different ports.")
    for number, option in ((port, "--port"), (page_port, "--label-studio-port")):
        if not processes.port_is_free(number):
            raise LabelStudioError(f"Port {number} is taken: stop what listens there, or choose another with {option}.")
    if reset and home.exists():
        with _alone(home):
            pass
        aside = home.with_name(f"demo-{datetime.now():%Y%m%d-%H%M%S}")
        home.rename(aside)
        console.print(f"The former demo is set aside in {aside}")


def _done(text: str) -> None:
    console.print(f"[green]✓[/green] {text}")


class Backend:
    """`bald-sam serve` on this machine, working in its own process: no Redis, no credentials, nothing from outside."""

    def __init__(self, settings: Settings, *, home: Path, port: int, label_studio_url: str) -> None:
        self.settings = settings
        self.home = home
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "backend.log"
        self._environment = os.environ | {
            "BALD_SAM_DATA_DIR": str(settings.data_dir.absolute()),
            "BALD_SAM_BACKBONE": settings.backbone,
            "BALD_SAM_CHECKPOINT": str(settings.checkpoint.absolute()) if settings.checkpoint else "",
            "BALD_SAM_DEVICE": settings.device,
            "BALD_SAM_HEAD": str(Path(settings.head).absolute()) if Path(settings.head).exists() else settings.head,
            "BALD_SAM_STRATEGY": settings.strategy,
            "BALD_SAM_REDIS_URL": "",
            "LABEL_STUDIO_URL": label_studio_url,
        }
        for name in ("BALD_SAM_BASIC_AUTH_USER", "BALD_SAM_BASIC_AUTH_PASS", "BALD_SAM_TOKEN"):
            self._environment.pop(name, None)
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def serving(self, token: str) -> Iterator[None]:
        """Start it, without waiting, with the personal access token that it fetches images with; stop it at the end."""
        command = [sys.executable, "-m", "ml_backend.cli", "serve", "--port", str(self.port)]
        environment = self._environment | {"LABEL_STUDIO_API_KEY": token}
        self._process = processes.start(command, env=environment, cwd=self.home, log=self.log)
        try:
            yield
        finally:
            processes.stop(self._process)

    def wait(self) -> None:
        """Until it answers. Raises LabelStudioError when it ended instead."""
        while not self._answers():
            if not self.runs():
                raise LabelStudioError(f"The backend stopped: {processes.last_words(self.log)} (log: {self.log})")
            time.sleep(0.2)

    def runs(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def try_a_click(self, image: str, label_config: str) -> None:
        """One click in the middle of an image, as project 0: the page would not say why a first click fails."""
        prompt = {
            "id": "trial",
            "type": "keypoint",
            "from_name": "kp",
            "to_name": "image",
            "original_width": 64,
            "original_height": 64,
            "is_positive": True,
            "value": {"x": 50.0, "y": 50.0, "width": 0.5},
        }
        body = {
            "tasks": [{"id": 0, "data": {"image": image}}],
            "project": "0.0",
            "label_config": label_config,
            "params": {"context": {"result": [prompt]}},
        }
        answer = requests.post(f"{self.url}/predict", json=body, timeout=600)
        if not answer.ok:
            words = answer.json()
            raise LabelStudioError(f"A first click failed: {words.get('error')} {words.get('hint')} (log: {self.log})")

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=2).ok
        except requests.RequestException:
            return False


def _panel(address: str, state: State) -> Panel:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    lines.add_row("Open", f"[link={address}]{address}[/link]")
    lines.add_row("Log in", f"{state.email}   password [bold]{state.password}[/bold]")
    lines.add_row("")
    lines.add_row(
        "1", "Switch [bold]Auto-Annotation[/bold] on at the bottom, click beside the picture, press [bold]M[/bold]."
    )
    lines.add_row("2", "Click on an object: a mask appears, and a ring where the next click tells the model most.")
    lines.add_row("3", "Click on the [bold]ring[/bold] if it is on the object, [bold]Alt+click[/bold] it if not.")
    lines.add_row("4", "Good? [bold]✓[/bold] at the bottom takes the mask. Next object, or [bold]Submit[/bold].")
    return Panel(lines, title="bald-sam demo", subtitle="Ctrl-C stops everything", border_style="magenta", expand=False)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Two demos must not share one database."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LabelStudioError(f"A demo runs already with {home}. Stop it, or give another --data-dir.") from error
        yield


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop the demo as Ctrl-C does; so does SIGINT where the script that started it ignores that."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
