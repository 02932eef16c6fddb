"""`bald-sam train`: a head from a project's masks, or from folders of images and masks."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ml_backend.cli import fail, load_settings
from ml_backend.commands.options import BACKBONE, CHECKPOINT, DEVICE

if TYPE_CHECKING:
    from worker.contract import TrainJob, TrainResult

STAGES = {
    "learning": "Learning",
    "reach": "Trying how far a click speaks",
    "calibrating": "Calibrating",
    "judging": "Judging on tasks held out in turn",
}


@click.command()
@click.option("--project", type=click.IntRange(1), help="Learn from what was submitted in this project.")
@click.option(
    "--data",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Learn from a folder with a metadata.json instead (repeatable).",
)
@click.option("--force", is_flag=True, help="--project: use the new head even if it is not better, or one is pinned.")
@click.option("--redis-url", help="--project: have a `bald-sam worker` train.")
@click.option("--json", "as_json", is_flag=True, help="--project: the result for scripts.")
@click.option("--name", help="--data: name of the head; it is kept in the data directory.")
@BACKBONE
@CHECKPOINT
@DEVICE
@click.option("--out", type=click.Path(path_type=Path), help="--data: write to this .safetensors file instead.")
@click.option("--objects", type=click.IntRange(1), help="At most this many objects. [--project: 400, --data: 600]")
@click.option("--per-image", default=2, type=click.IntRange(1), help="--data: objects of one image.", show_default=True)
@click.option("--clicks", default=6, type=click.IntRange(1), help="--data: states of each object.", show_default=True)
@click.option("--effective", default=40.0, help="--data: independent pixels that a state counts as.", show_default=True)
@click.option("--calibrate", default=60, type=click.IntRange(0), help="--data: objects kept apart for calibration.")
@click.option("--seed", default=0, show_default=True)
def train(
    project: int | None,
    folders: tuple[Path, ...],
    force: bool,
    redis_url: str | None,
    as_json: bool,
    name: str | None,
    objects: int | None,
    seed: int,
    backbone: str | None,
    checkpoint: Path | None,
    device: str | None,
    **folder_options: Any,
) -> None:
    """Fit a head and its posterior to click sessions on known masks.

    With --project: to the masks submitted in a project and the clicks that made them. The head is judged on tasks held
    out in turn, and the project uses it from the next click on if it is better. With --data: to simulated sessions on
    folders.
    """
    settings = load_settings(redis_url=redis_url, backbone=backbone, checkpoint=checkpoint, device=device)
    if (project is None) == (not folders):
        fail("Give either --project, a number in your Label Studio, or --data, a folder of images and masks.")
    if project is not None:
        _train_project(project, settings, objects or 400, seed, force=force, as_json=as_json)
        return
    if not name:
        fail("Give the head a --name.")
    _train_folders(folders, settings, name, objects or 600, seed, **folder_options)


# --- a project --------------------------------------------------------------------------------------------------------


def _train_project(project: int, settings: Any, most: int, seed: int, *, force: bool, as_json: bool) -> None:
    from requests import RequestException

    from ml_backend.errors import BackendError
    from ml_backend.jobs.failures import JobFailed
    from ml_backend.label_studio_api import LabelStudioError
    from worker.contract import TrainJob

    console = Console(stderr=True)
    try:
        with console.status("Reading the submitted masks from Label Studio"):
            gathered = _gather(project, settings, most)
        console.print(
            f"{gathered.masks} masks on {gathered.images} images; {len(gathered.objects)} to learn from and to judge "
            f"on, {sum(bool(one.states) for one in gathered.objects)} of them with logged clicks."
        )
        for reason, count in gathered.left_out.items():
            if count:
                console.print(f"{count} regions were left out: {reason}.")
        job = TrainJob(project=project, objects=gathered.objects, seed=seed, force=force)
        with _shown(console) as progress:
            result = _run(job, settings, progress)
    except (BackendError, JobFailed, LabelStudioError) as error:
        fail(str(error))
    except RequestException as error:
        fail(f"Label Studio cannot be reached at {settings.label_studio_url} ({type(error).__name__}).")
    except KeyboardInterrupt:
        if settings.redis_url is not None:
            fail("A worker goes on with it; `bald-sam heads list` shows the head when it is done.")
        raise
    for url, reason in result.skipped.items():
        console.print(f"Skipped {url}: {reason}")
    click.echo(json.dumps(result.model_dump(mode="json"), indent=1) if as_json else _told(result))
    sys.exit(0 if result.used else 1)


def _gather(project: int, settings: Any, most: int) -> Any:
    from sqlalchemy.exc import SQLAlchemyError

    from ml_backend.annotations import gather
    from ml_backend.clicks.schema import make_engine, migrate
    from ml_backend.label_studio_api import api_from

    api = api_from(settings)
    try:
        engine = make_engine(settings.clicks_database(), settings.data_dir)
        migrate(engine)
        return gather(api, project, engine=engine, most=most)
    except (SQLAlchemyError, ValueError, OSError) as error:
        click.echo(f"The click log cannot be read ({error}); sessions are simulated.", err=True)
        return gather(api, project, most=most)


def _run(job: TrainJob, settings: Any, progress: Any) -> TrainResult:
    """In a worker where the settings name a Redis, else here; a server with this data directory takes the head up."""
    from ml_backend.jobs import make_runner
    from ml_backend.jobs.failures import JobFailed

    if settings.redis_url is not None:
        result: TrainResult = make_runner(settings).train(job, progress)
        return result
    try:
        learning, runtime = importlib.import_module("evaluation.learning"), importlib.import_module("worker.runtime")
        tasks = importlib.import_module("worker.tasks")
    except ModuleNotFoundError as error:
        fail(f"Training needs {error.name}, which is not installed: pip install 'bald-sam[worker]'.")
    # A decode of a small model on the CPU is too short to share out: threads that wait cost more than they bring.
    importlib.import_module("torch").set_num_threads(1)
    runtime.configure(settings.runtime_options())
    try:
        learnt: TrainResult = learning.learn(job, runtime.runtime(), report=progress)
    except Exception as error:
        words = tasks.failure(error)
        raise JobFailed(words.error, words.hint, words.status) from error
    return learnt


@contextmanager
def _shown(console: Console) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        shown = bars.add_task("Starting", total=None)
        current = ""

        def tell(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage == "waiting":
                words = "Waiting for a worker" if done else "Waiting: no worker takes training jobs (`bald-sam worker`)"
                bars.update(shown, description=words, total=None)
                return
            if stage != current:
                current = stage
                bars.reset(shown)
            bars.update(shown, description=STAGES.get(stage, stage), completed=done, total=total)

        yield tell


def _told(result: TrainResult) -> str:
    return (
        f"{result.head}: {result.reason[0].upper()}{result.reason[1:]}\n"
        f"Held out in turn: {result.held_out} objects on {result.images_held_out} images. AUC {result.auc_before:.4f} "
        f"with {result.before}, {result.auc:.4f} with the new head. {result.objects} objects learnt from, "
        f"{result.logged} with logged clicks, in {result.seconds:.0f} s."
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _train_folders(
    folders: tuple[Path, ...],
    settings: Any,
    name: str,
    objects: int,
    seed: int,
    *,
    out: Path | None,
    per_image: int,
    clicks: int,
    effective: float,
    calibrate: int,
) -> None:
    import torch

    from evaluation.calibration import calibrated
    from evaluation.datasets import read_pairs, subset
    from evaluation.session import Session
    from worker.backbones import build
    from worker.head.fit import FitOptions
    from worker.head.store import save_head
    from worker.proposer import Proposer
    from worker.training import SessionOptions, train_head

    torch.set_num_threads(1)
    console = Console(stderr=True)
    try:
        share = -(-objects // len(folders))
        examples = [
            pair for folder in folders for pair in subset(read_pairs(folder, per_image=per_image, seed=seed), share)
        ]
        apart = subset(examples, calibrate) if 2 * calibrate < len(examples) else []
        images = {pair.image for pair in apart}
        examples = [pair for pair in examples if pair.image not in images]
        model = build(
            settings.backbone,
            checkpoint=settings.checkpoint,
            device=settings.device,
            data_dir=settings.data_dir,
            zoom=settings.zoom,
        )
        proposer = Proposer(model, head="none", data_dir=settings.data_dir)

        def sessions(stage: str) -> Iterator[tuple[str, Session]]:
            for number, pair in enumerate(apart, 1):
                yield f"{pair.dataset}/{pair.name}", Session.open(model, proposer, pair)
                progress(stage, number, len(apart))

        with _shown(console) as progress:
            head = train_head(
                model,
                examples,
                SessionOptions(clicks=clicks, seed=seed),
                FitOptions(effective=effective),
                notes={"sets": sorted({pair.dataset for pair in examples})},
                progress=lambda done: progress("learning", done, len(examples)),
            )
            if apart and calibrate:
                head, found = calibrated(model, head, sessions, seed=seed)
    except ValueError as error:
        fail(str(error))
    path = out or settings.data_dir / "heads" / name / "head.safetensors"
    save_head(head, path)
    if apart and calibrate:
        click.echo(f"Mean IoU over 15 clicks: SAM's mask {found.iou['sam']:.4f}, the head's {found.iou['head']:.4f}.")
        if "reach" in found.iou:
            click.echo(f"With the reach of clicks that the likelihood calls for: {found.iou['reach']:.4f}.")
        click.echo(
            f"Stopping under {found.stop.threshold:.4g} saves {found.stop.saved:.0%} of the clicks for "
            f"{found.stop.lost:.4f} IoU."
        )
    click.echo(f"{path}: {head.notes['states']} states of {head.notes['objects']} objects.")
    if out is None:
        click.echo(f"Use it with `bald-sam heads use {name}`, or `--head {name}`.")
