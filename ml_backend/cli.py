"""`bald-sam`: the command line. Commands are imported when they are called, so that `--help` is quick."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import click

from ml_backend.commands.options import BACKBONE, DEVICE, HEAD

#: Command -> (module:attribute, one line of help).
COMMANDS = {
    "ablate": ("ml_backend.commands.ablate:ablate", "Compare Laplace settings on several backbones."),
    "bench": ("ml_backend.commands.bench:bench", "Measure speed, as ratios within one run."),
    "clicks": ("ml_backend.commands.clicks:clicks", "Export and report the click log."),
    "connect": ("ml_backend.commands.connect:connect", "Connect a project of your Label Studio to a running backend."),
    "demo": ("ml_backend.commands.demo:demo", "Start Label Studio, a sample project and the backend on this machine."),
    "embed": ("ml_backend.commands.embed:embed", "Encode the images of a project or folder before they are opened."),
    "evaluate": ("ml_backend.commands.evaluate:evaluate", "Compare strategies with a simulated annotator."),
    "heads": ("ml_backend.commands.heads:heads", "List the heads; choose, pin or roll back the one in use."),
    "models": ("ml_backend.commands.models:models", "List, download and describe the backbones."),
    "prelabel": ("ml_backend.commands.prelabel:prelabel", "Pre-label a project or a folder of images."),
    "train": ("ml_backend.commands.train:train", "Train a head on a project, or on folders of images and masks."),
}


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    click.echo(message, err=True)
    sys.exit(2)


class LazyGroup(click.Group):
    """A group that knows of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, attribute = COMMANDS[cmd_name][0].split(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as exc:
            fail(f"`bald-sam {cmd_name}` needs {exc.name}, which is not installed: pip install 'bald-sam[worker]'.")
        except AttributeError:
            fail(f"`bald-sam {cmd_name}` is not part of this version.")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            rows.append((name, own.get_short_help_str(90) if own else COMMANDS[name][1]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bald-sam", prog_name="bald-sam")
def main() -> None:
    """A Label Studio ML backend that answers a click with a mask and a proposed next click."""


def load_settings(**options: Any) -> Any:
    """Settings from the environment, with the options that were given; exit 2 with a line for each error."""
    from pydantic import ValidationError

    from ml_backend.settings import Settings

    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as exc:
        fail(
            "\n".join(
                f"Setting {'.'.join(map(str, e['loc']))} (BALD_SAM_{'_'.join(map(str, e['loc'])).upper()}): {e['msg']}."
                for e in exc.errors(include_url=False, include_input=False)
            )
        )


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9090, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--redis-url", help="Send work to `bald-sam worker` processes; without it this process does it all.")
@BACKBONE
@DEVICE
@HEAD
@click.option("--strategy", help="How the next click is chosen.")
@click.option("--threads", default=32, show_default=True, type=click.IntRange(1, 1024), help="Requests at once.")
@click.option("--no-auth", is_flag=True, help="Let other machines in without credentials.")
def serve(host: str, port: int, threads: int, no_auth: bool, **options: str | None) -> None:
    """Serve Label Studio."""
    import waitress

    from ml_backend import auth, logs, memory
    from ml_backend.errors import BackendError

    memory.share_arenas()
    settings = load_settings(**options)
    try:
        auth.check_exposure(host, settings, no_auth=no_auth)
    except BackendError as exc:
        fail(str(exc))
    logs.configure(settings)

    from ml_backend.app import create_app

    try:
        app = create_app(settings)
    except (BackendError, OSError, ValueError) as exc:
        fail(str(exc))
    runner, clicks = app.extensions["bald_sam_runner"], app.extensions["bald_sam_clicks"]
    try:
        server = waitress.create_server(
            app,
            host=host,
            port=port,
            threads=threads,
            ident="bald-sam",
            max_request_body_size=(settings.max_request_mb + 1) * 1_000_000,
            # A request carries the masks of all drafts, megabytes of them: read in few and large steps, and in memory.
            # docs/results/request-size.md has the ratio with these values and with waitress' own.
            recv_bytes=256 * 1024,
            inbuf_overflow=32 * 1024 * 1024,
        )
    except OSError as exc:
        runner.close()
        fail(f"Cannot listen on {host}:{port}: {exc.strerror or exc}. Choose another with --port.")
    shown = f"[{host}]" if ":" in host else host
    where = "Redis workers" if settings.redis_url else "this process"
    click.echo(
        f"bald-sam listens on http://{shown}:{_port(server, port)} (backbone {settings.backbone}, work in {where})"
    )
    signal.signal(signal.SIGTERM, _stop)
    if settings.redis_url is None:
        target = (settings, app.extensions["bald_sam_ready"])
        threading.Thread(target=_warm_up, args=target, name="warm-up", daemon=True).start()
    if clicks is not None:
        try:
            clicks.start()
        except OSError as exc:
            runner.close()
            fail(f"The click log cannot be written in {settings.data_dir}: {exc.strerror or exc}.")
    app.extensions["bald_sam_learning"].start()
    app.extensions["bald_sam_retrieval"].start()
    try:
        server.run()
    finally:
        server.close()
        app.extensions["bald_sam_learning"].close()
        app.extensions["bald_sam_retrieval"].close()
        runner.close()
        if clicks is not None:
            clicks.close()


def _port(server: Any, asked: int) -> int:
    port = getattr(server, "effective_port", None)
    if port is None and (listen := getattr(server, "effective_listen", None)):
        port = listen[0][1]
    return int(port or asked)


def _warm_up(settings: Any, ready: threading.Event) -> None:
    """Load the model while the server already answers; a click that comes first waits for it."""
    try:
        runtime = importlib.import_module("worker.runtime")
        runtime.configure(settings.runtime_options())
        runtime.warm_up()
    except Exception as exc:
        logging.getLogger(__name__).error("the model could not be loaded, so clicks will fail: %s", exc)
    else:
        ready.set()


@main.command()
@click.option("--redis-url", help="Where the queues are.")
@click.option("--queues", help="Comma-separated; without it all: interactive, embed, batch, train.")
@BACKBONE
@DEVICE
@HEAD
@click.option("--strategy", help="How the next click is chosen.")
@click.option("--check", is_flag=True, help="Do no work: exit 0 if a worker of this machine is ready, else 1.")
def worker(queues: str | None, check: bool, **options: str | None) -> None:
    """Do the work of a server that was started with the same Redis."""
    from ml_backend import logs
    from worker.contract import Queue

    names = [name.strip() for name in queues.split(",") if name.strip()] if queues else list(Queue)
    if unknown := [name for name in names if name not in set(Queue)]:
        fail(f"There is no queue {', '.join(unknown)}; there are {', '.join(Queue)}.")
    settings = load_settings(**options)
    if settings.redis_url is None:
        fail("A worker needs to know the Redis: give --redis-url redis://host:6379 or set BALD_SAM_REDIS_URL.")
    if check:
        _check_worker(settings)
        return
    try:
        process, rq_worker = (importlib.import_module(f"worker.{name}") for name in ("process", "rq_worker"))
    except ModuleNotFoundError as exc:
        fail(f"`bald-sam worker` needs {exc.name}, which is not installed: pip install 'bald-sam[worker]'.")
    logs.configure(settings, rq_worker.log_ids)
    process.work(settings.runtime_options(), [Queue(name) for name in names])


def _check_worker(settings: Any) -> None:
    """Say how the workers of this machine are; exit 1 unless one of them is ready."""
    import socket

    from ml_backend.jobs.rq_runner import RqRunner

    runner = RqRunner(settings.redis_url.get_secret_value())
    status = runner.status()
    runner.close()
    here = [worker for worker in status["workers"] if worker["name"].startswith(f"{socket.gethostname()}-")]
    for worker in here:
        click.echo(f"{worker['name']}: {worker.get('reason') or worker['state']}")
    if not here:
        click.echo(status.get("error") or "No worker of this machine is alive.", err=True)
    sys.exit(0 if any(worker["state"] == "ready" for worker in here) else 1)


@main.command("config-xml")
@click.option("--labels", required=True, help="Comma-separated, for example Car,Wheel.")
@click.option("--per-class", is_flag=True, help="One prompt tool for each label instead of one for all.")
@click.option("--boxes/--no-boxes", default=True, show_default=True, help="Rectangles as prompts too.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of the screen.")
def config_xml(labels: str, per_class: bool, boxes: bool, out: Path | None) -> None:
    """Print a labelling config for Settings > Labeling Interface > Code."""
    from ml_backend.errors import ConfigError
    from ml_backend.labeling_config import recommended_config

    try:
        text = recommended_config(labels.split(","), per_class=per_class, boxes=boxes)
    except ConfigError as exc:
        fail(str(exc))
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as exc:
        fail(f"Cannot write {out}: {exc.strerror}.")


if __name__ == "__main__":
    main()
