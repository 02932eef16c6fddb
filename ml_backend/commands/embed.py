"""`bald-sam embed`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import redis
import requests
from rich.console import Console

from ml_backend import labeling_config
from ml_backend.cli import fail, load_settings
from ml_backend.commands.options import BACKBONE, DEVICE
from ml_backend.commands.prelabel import batch_of, report, watching
from ml_backend.errors import BackendError, RequestError
from ml_backend.jobs.failures import JobFailed
from ml_backend.label_studio_api import LabelStudioError, api_from, where
from ml_backend.prelabel.batch import Summary
from ml_backend.prelabel.folder import images_of
from ml_backend.settings import Settings
from ml_backend.task_image import image_of
from worker.contract import ImageRef, PrelabelFailure, PrelabelItem, PrelabelOptions

#: Most bytes of one embedding (half precision) with the colours beside it: 96 x 64 x 64 and 3 x 256 x 256 for tiny,
#: less of what is no square; 256 x 64 x 64 and 3 x 256 x 256 for the others.
EMBEDDING_BYTES = {"tiny": 2 * 96 * 64 * 64 + 3 * 256 * 256}
LARGE_EMBEDDING_BYTES = 2 * 256 * 64 * 64 + 3 * 256 * 256


@click.command()
@click.option("--project", type=click.IntRange(1), help="Number of a project in your Label Studio.")
@click.option("--images", type=click.Path(path_type=Path), help="A folder instead of a project.")
@click.option("--view", type=click.IntRange(1), help="Only the tasks of this Data Manager tab (`tab=` in its address).")
@click.option("--unlabelled", is_flag=True, help="Only tasks without annotations.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images.")
@click.option("--estimate", is_flag=True, help="Only say how much it will be.")
@BACKBONE
@DEVICE
@click.option("--redis-url", help="Have `bald-sam worker` processes do it, and keep the embeddings in Redis.")
@click.option("--json", "as_json", is_flag=True, help="The summary for scripts.")
def embed(
    project: int | None,
    images: Path | None,
    view: int | None,
    unlabelled: bool,
    limit: int | None,
    estimate: bool,
    as_json: bool,
    **options: str | None,
) -> None:
    """Encode the images of a project or a folder, so that no first click waits for an encoder.

    The embeddings go to BALD_SAM_EMBEDDINGS_DIR, which serve and worker read; with Redis to Redis, for a working day,
    and to the workers' folder if they have one. What is there already costs only its reading.
    """
    settings = load_settings(**options)
    if (project is None) == (images is None):
        fail("Give --project with the number of a project, or --images with a folder.")
    if settings.redis_url is None and settings.embeddings_dir is None:
        fail(
            "There is nowhere to keep embeddings: set BALD_SAM_EMBEDDINGS_DIR to a folder (for serve and worker too), "
            "or give --redis-url."
        )
    try:
        found = _in_folder(images) if images is not None else _in_project(settings, project or 0, view, unlabelled)
        items = [PrelabelItem(key=image.url, image=image) for image in list(found)[:limit]]
        _announce(settings, len(items), as_json=as_json, estimate=estimate)
        if estimate:
            return
        summary = Summary(total=len(items))
        with watching(as_json, "Encoding") as observe:
            observe(summary)
            for answer in batch_of(settings, images).prelabel(items, PrelabelOptions(keep=True, propose=False)):
                if isinstance(answer, PrelabelFailure):
                    summary.failed[answer.key] = f"{answer.error} {answer.hint}".strip()
                else:
                    summary.done += 1
                observe(summary)
        report(summary, as_json, f"{summary.done} of {summary.total} images are encoded.", "Run the command again.")
    except (BackendError, JobFailed, LabelStudioError) as error:
        fail(str(error))
    except requests.RequestException as error:
        fail(f"Label Studio at {settings.label_studio_url} cannot be reached ({type(error).__name__}). Does it run?")
    except KeyboardInterrupt:
        fail("Stopped. What is encoded stays; the same command goes on from here.")
    if summary.failed:
        sys.exit(1)


def _announce(settings: Settings, count: int, *, as_json: bool, estimate: bool) -> None:
    """Say how much it will be. Raises BackendError when there is no room for it."""
    needed = count * EMBEDDING_BYTES.get(settings.backbone, LARGE_EMBEDDING_BYTES)
    room, place = _room(settings)
    if not as_json:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"{count} images, at most {_size(needed)} of embeddings, into {place} ({_size(room)} free)"
        )
    elif estimate:
        click.echo(json.dumps({"images": count, "bytes": needed, "free_bytes": int(room)}))
    if needed > room:
        raise BackendError(
            f"{_size(needed)} of embeddings may not fit into {place}.", "Take fewer images with --limit, or make room."
        )


def _in_folder(folder: Path) -> list[ImageRef]:
    return [ImageRef(url=str(path.resolve())) for path in images_of(folder)]


def _in_project(settings: Settings, project: int, view: int | None, unlabelled: bool) -> Iterable[ImageRef]:
    api = api_from(settings)
    config = labeling_config.parse(api.project(project)["label_config"])
    filters = [where("total_annotations", "equal", 0)] if unlabelled else []
    for task in api.tasks(project, regions=False, view=view, filters=filters):
        try:
            yield image_of(task, config, project)
        except RequestError as error:
            click.echo(f"Task {task['id']} is left out: {error}", err=True)


def _room(settings: Settings) -> tuple[float, str]:
    """Free bytes where embeddings are kept, and what that place is called."""
    if settings.redis_url is not None:
        try:
            with redis.Redis.from_url(settings.redis_url.get_secret_value(), socket_connect_timeout=5) as client:
                memory = client.info("memory")
        except redis.RedisError as error:
            raise BackendError(
                f"Redis cannot be reached ({type(error).__name__}).", "Check that it runs where --redis-url says."
            ) from error
        limit = memory["maxmemory"] or memory.get("total_system_memory", 0)
        return max(0, limit - memory["used_memory"]), "Redis"
    folder = settings.embeddings_dir
    assert folder is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise BackendError(f"{folder} cannot be used: {error.strerror or error}.", "Choose another folder.") from error
    return min(free, settings.embeddings_gb * 1e9), str(folder)


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
