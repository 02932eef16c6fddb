"""`bald-sam prelabel`."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import requests
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ml_backend.cli import fail, load_settings
from ml_backend.commands.options import BACKBONE, DEVICE, HEAD
from ml_backend.errors import BackendError, RequestError
from ml_backend.heads_in_use import model_version
from ml_backend.jobs.failures import JobFailed
from ml_backend.label_studio_api import LabelStudioError, api_from
from ml_backend.prelabel.batch import Answer, Batch, Observer, Summary
from ml_backend.prelabel.folder import FolderRun, folder_config, images_of, prelabel_folder
from ml_backend.prelabel.journal import Journal
from ml_backend.prelabel.project import ProjectRun, journal_path, prelabel_project
from ml_backend.prelabel.prompts import PromptFile, read_prompts
from ml_backend.prelabel.task_prompts import AUTO, EVERYTHING, TaskPrompts, checked_source
from ml_backend.settings import Settings
from worker.contract import Everything, PrelabelItem, PrelabelOptions, RuntimeOptions

#: Where Label Studio finds the images of its local storage; see docs/prelabel.md.
LOCAL_FILES = "/data/local-files/?d={path}"
#: Lower priority than a server on the same machine, as `nice` counts.
NICENESS = 10
#: Failures that are shown one by one.
SHOWN_FAILURES = 10


class ThisProcess:
    """Does the work of a batch here, image after image, without a queue."""

    def __init__(self, options: RuntimeOptions) -> None:
        self._options = options

    def prelabel(self, items: Iterable[PrelabelItem], options: PrelabelOptions) -> Iterator[Answer]:
        """See `Batch`."""
        runtime = importlib.import_module("worker.runtime")
        batch = importlib.import_module("worker.batch")
        tasks = importlib.import_module("worker.tasks")
        runtime.configure(self._options)
        try:
            yield from batch.run(items, options, runtime.runtime())
        except Exception as error:
            words = tasks.failure(error)
            raise JobFailed(words.error, words.hint, words.status) from error


@click.command()
@click.option("--project", type=click.IntRange(1), help="Number of a project in your Label Studio.")
@click.option("--images", type=click.Path(path_type=Path), help="A folder instead of a project; needs no Label Studio.")
@click.option(
    "--prompts",
    "source",
    help="A CSV or COCO .json file, or `everything`; in a project also `regions` on the tasks, `field:NAME` of their "
    "data, or `auto`: regions, else everything.  [default: auto]",
)
@click.option("--view", type=click.IntRange(1), help="Only the tasks of this Data Manager tab (`tab=` in its address).")
@click.option("--tasks", "task_ids", help="Only these tasks: 5,8,20-40.")
@click.option("--unlabelled", "unlabelled_tasks", is_flag=True, help="Only tasks without annotations.")
@click.option("--limit", type=click.IntRange(1), help="At most so many tasks.")
@click.option("--replace", is_flag=True, help="Delete the predictions of bald-sam's other versions.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The tasks to import, with --images.")
@click.option("--label", help="Label of regions whose prompt has none.")
@click.option("--each-point", is_flag=True, help="Every point of a CSV is an object of its own.")
@click.option("--format", "shape", type=click.Choice(["brush", "polygon"]), default="brush", show_default=True)
@click.option("--keep-embeddings", "keep", is_flag=True, help="As `bald-sam embed` does, for the annotators' clicks.")
@click.option("--zoom", is_flag=True, help="Look at each object from near, as clicks do: better masks, slower.")
@click.option("--no-proposal", is_flag=True, help="Masks only, without a proposed next click.")
@click.option("--retry-failed", is_flag=True, help="Try again what failed before.")
@click.option("--image-url", default=LOCAL_FILES, show_default=True, help="Address of an image in the tasks.")
@click.option("--grid", type=click.IntRange(1, 64), help="everything: points per side.")
@click.option(
    "--min-iou", type=click.FloatRange(0, 1), help="everything: least predicted IoU.  [default: 0.7; tiny 0.4]"
)
@click.option(
    "--min-stability",
    type=click.FloatRange(0, 1),
    help="everything: least stability of the mask.  [default: 0.8; tiny 0.1]",
)
@click.option("--max-overlap", type=click.FloatRange(0, 1), help="everything: IoU with a better region.")
@click.option("--min-area", type=click.FloatRange(0, 1), help="everything: share of the image.")
@click.option("--max-area", type=click.FloatRange(0, 1), help="everything: share of the image.")
@click.option("--top", type=click.IntRange(1), help="everything: so many regions an image at most.")
@BACKBONE
@DEVICE
@HEAD
@click.option("--strategy", help="How the next click is chosen.")
@click.option("--redis-url", help="Have `bald-sam worker` processes do the work.")
@click.option("--json", "as_json", is_flag=True, help="The summary for scripts.")
def prelabel(
    project: int | None,
    images: Path | None,
    source: str | None,
    out: Path | None,
    label: str | None,
    each_point: bool,
    shape: str,
    keep: bool,
    zoom: bool,
    no_proposal: bool,
    retry_failed: bool,
    image_url: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Pre-label a project or a folder of images.

    Killed or stopped, the same command goes on where it was.
    """
    selection = {name: options.pop(name) for name in ("view", "task_ids", "unlabelled_tasks", "limit", "replace")}
    settings = load_settings(
        **{name: options.pop(name) for name in ("backbone", "device", "head", "strategy", "redis_url")}
    )
    filters = {_FILTERS.get(name, name): value for name, value in options.items() if value is not None}
    wanted = PrelabelOptions(
        polygons=shape == "polygon", propose=not no_proposal, strategy=settings.strategy, keep=keep, zoom=zoom
    )
    if (project is None) == (images is None):
        fail("Give --project with the number of a project, or --images with a folder.")
    try:
        if images is not None:
            if out is None:
                fail("Give --out with the file of tasks to write, for example --out tasks.json.")
            if given := next((name for name, value in selection.items() if value), None):
                fail(f"--{given.replace('_ids', '').replace('_tasks', '')} is for --project.")
            images_of(images)
            prompts, fingerprint = _prompts(source or EVERYTHING, each_point, label, filters)
            run = FolderRun(
                folder=images,
                out=out,
                prompts=prompts,
                controls=folder_config(_labels(prompts, label), polygons=wanted.polygons),
                options=wanted,
                version=model_version(settings),
                url=image_url,
                unlabelled=label is None,
                fingerprint=fingerprint,
            )
            batch = batch_of(settings, images)
            with watching(as_json) as observe:
                summary = prelabel_folder(run, batch, retry_failed=retry_failed, observe=observe)
            report(summary, as_json, f"{_words(summary, 'images')} {out} is written.")
        else:
            assert project is not None
            summary = _project(
                settings,
                project,
                _task_prompts(source or AUTO, each_point, label, filters),
                wanted,
                selection,
                retry_failed=retry_failed,
                as_json=as_json,
            )
    except (BackendError, JobFailed, LabelStudioError) as error:
        fail(str(error))
    except requests.RequestException as error:
        fail(f"Label Studio at {settings.label_studio_url} cannot be reached ({type(error).__name__}). Does it run?")
    except KeyboardInterrupt:
        fail("Stopped. Nothing is lost: the same command goes on from here.")
    if summary.failed:
        sys.exit(1)


def _project(
    settings: Settings,
    project: int,
    prompts: TaskPrompts,
    wanted: PrelabelOptions,
    selection: dict[str, Any],
    *,
    retry_failed: bool,
    as_json: bool,
) -> Summary:
    api = api_from(settings)
    version = model_version(settings, project)
    run = ProjectRun(
        project=project,
        prompts=prompts,
        options=wanted,
        version=version,
        tasks=_ids(selection.pop("task_ids")),
        **selection,
    )
    batch = batch_of(settings)
    journal = Journal(journal_path(settings.data_dir, project, version)).open()
    try:
        with watching(as_json) as observe:
            summary = prelabel_project(api, run, batch, journal, retry_failed=retry_failed, observe=observe)
    finally:
        journal.close()
    report(summary, as_json, f"{_words(summary, 'tasks')} Their model version is {version}.")
    return summary


def _ids(text: str | None) -> frozenset[int] | None:
    """`5,8,20-40` as numbers."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise RequestError(f"--tasks {text} is no list of task numbers.", "For example --tasks 5,8,20-40.")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


_FILTERS = {"grid": "points_per_side"}


def _prompts(
    source: str, each_point: bool, label: str | None, filters: dict[str, Any]
) -> tuple[PromptFile | Everything, str]:
    """The prompts, and a hash of what they depend on."""
    if source == EVERYTHING:
        return Everything(label=label, **filters), ""
    if filters:
        raise RequestError(f"--{next(iter(filters))} is for --prompts everything.")
    path = Path(source)
    if path.suffix.lower() not in (".csv", ".json"):
        raise RequestError(
            f"--prompts {source} is neither a .csv nor a .json file.",
            "Give one of these, or `everything`; in a project also `regions`, `field:NAME` or `auto`.",
        )
    found = read_prompts(path, each_point=each_point)
    if label is not None:
        found.label_all(label)
    return found, hashlib.sha256(path.read_bytes() + bytes([each_point])).hexdigest() + (label or "")


def _task_prompts(source: str, each_point: bool, label: str | None, filters: dict[str, Any]) -> TaskPrompts:
    """Where the prompts of a project's tasks come from."""
    try:
        checked_source(source)
    except ValueError:
        found, _ = _prompts(source, each_point, label, filters)
        assert isinstance(found, PromptFile)
        return TaskPrompts(source, file=found, label=label)
    if filters and source not in (EVERYTHING, AUTO):
        raise RequestError(f"--{next(iter(filters))} is for --prompts everything.")
    return TaskPrompts(source, everything=Everything(**filters), label=label)


def _labels(prompts: PromptFile | Everything, label: str | None) -> list[str]:
    """The labels that occur, in order."""
    if isinstance(prompts, Everything):
        return [label] if label else []
    found = [one.label for entry in prompts.by_name.values() for one in entry.objects]
    return list(dict.fromkeys(one for one in found if one is not None))


def batch_of(settings: Settings, images: Path | None = None) -> Batch:
    """Who does the work: the workers behind Redis, or this process, which may read `images` then."""
    if settings.redis_url is not None:
        from ml_backend.jobs import make_runner

        return make_runner(settings)
    try:
        importlib.import_module("worker.batch")
    except ModuleNotFoundError as exc:
        fail(f"`bald-sam prelabel` needs {exc.name}, which is not installed: pip install 'bald-sam[worker]'.")
    os.nice(NICENESS)
    options = settings.runtime_options()
    if images is not None:
        options = options.model_copy(update={"local_roots": (*options.local_roots, images.resolve())})
    return ThisProcess(options)


class Rate(ProgressColumn):
    """Images per second since the start."""

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def watching(as_json: bool, doing: str = "Pre-labelling") -> Iterator[Observer]:
    """A progress bar with rate and time left, on stderr; nothing for scripts."""
    if as_json:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(doing, total=None, failed="")
        started = False

        def observe(summary: Summary) -> None:
            nonlocal started
            failed = f"[red]{len(summary.failed)} failed[/red]" if summary.failed else ""
            now = summary.done + summary.already + len(summary.failed)
            if not started:  # what was done before does not count for the rate
                progress.reset(bar, total=summary.total, completed=now, failed=failed)
                started = True
            progress.update(bar, completed=now, failed=failed)

        yield observe


def report(summary: Summary, as_json: bool, done: str, again: str = "--retry-failed tries these again.") -> None:
    """What became of a run: for a person, reasons of failures with how many they concern."""
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(done)
    for note in summary.notes:
        console.print(f"[yellow]![/yellow] {note}")
    if summary.failed:
        console.print(f"[red]{len(summary.failed)} failed[/red]. {again}")
        by_reason: dict[str, list[str]] = {}
        for key, reason in summary.failed.items():
            by_reason.setdefault(reason, []).append(key)
        for reason, keys in sorted(by_reason.items(), key=lambda one: -len(one[1]))[:SHOWN_FAILURES]:
            shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            console.print(f"  {len(keys)} x {reason} ({shown})", markup=False)


def _words(summary: Summary, what: str) -> str:
    before = f"; {summary.already} were done before" if summary.already else ""
    return f"{summary.done} of {summary.total} {what} pre-labelled, {summary.regions} regions{before}."
