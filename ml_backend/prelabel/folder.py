"""Pre-labelling a folder of images into one file of tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ml_backend.errors import RequestError
from ml_backend.labeling_config import NEXT_INSIDE, NEXT_OUTSIDE, Control, LabelingConfig
from ml_backend.prelabel.batch import Batch, Observer, Summary
from ml_backend.prelabel.journal import Journal
from ml_backend.prelabel.prompts import PromptFile
from ml_backend.prelabel.results import Controls, prediction
from worker.contract import Everything, ImageRef, PrelabelFailure, PrelabelItem, PrelabelOptions

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def images_of(folder: Path) -> list[Path]:
    """Image files under a folder, sorted. Raises RequestError where there is none."""
    if not folder.is_dir():
        raise RequestError(f"There is no folder {folder}.", "Give --images the folder that holds the images.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise RequestError(f"There are no images under {folder}.", f"Known are {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


@dataclass(frozen=True)
class FolderRun:
    """A folder to pre-label into one file of tasks.

    `url`: what the tasks say for an image; `{path}` is its path from the folder's parent, `{name}` its file name.
    """

    folder: Path
    out: Path
    prompts: PromptFile | Everything
    controls: Controls
    options: PrelabelOptions
    version: str
    url: str
    unlabelled: bool = False
    #: Anything else whose change makes an earlier part of the run useless, as a hash of the prompt file.
    fingerprint: str = ""

    @property
    def journal(self) -> Path:
        """Where the run keeps what it has done, until it is finished."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def header(self) -> dict[str, Any]:
        """What the run depends on: a journal of anything else is of no use."""
        return {
            "folder": str(self.folder.resolve()),
            "version": self.version,
            "options": self.options.model_dump(),
            "everything": self.prompts.model_dump() if isinstance(self.prompts, Everything) else None,
            "unlabelled": self.unlabelled,
            "fingerprint": self.fingerprint,
        }


def prelabel_folder(run: FolderRun, batch: Batch, *, retry_failed: bool = False, observe: Observer = print) -> Summary:
    """Do what is left of a run, and write the file of tasks. Raises RequestError, BackendError, JobFailed.

    The journal beside the file keeps every finished image; the file is written at the end, at once. Images that failed
    stay failed on the next run unless `retry_failed`, and as long as there are any, so does the journal.
    """
    work = {item.key: item for path in images_of(run.folder) if (item := _item(run, path)) is not None}
    summary = Summary(total=len(work), notes=_notes(run, work))
    journal = Journal(run.journal).open(run.header)
    try:
        left = []
        for key, item in work.items():
            if key in journal.done:
                summary.already += 1
            elif key in journal.failed and not retry_failed:
                summary.failed[key] = journal.failed[key]
            else:
                left.append(item)
        observe(summary)
        for answer in batch.prelabel(left, run.options):
            if isinstance(answer, PrelabelFailure):
                summary.failed[answer.key] = f"{answer.error} {answer.hint}".strip()
                journal.fail(answer.key, summary.failed[answer.key])
            else:
                summary.done += 1
                summary.regions += len(answer.regions)
                made = prediction(answer, run.controls, run.version, unlabelled=run.unlabelled)
                journal.add(answer.key, made)
            observe(summary)
        _write(run.out, [_task(run, key, journal.done[key]) for key in work if key in journal.done])
    except BaseException:
        journal.close()
        raise
    journal.close(delete=not summary.failed)
    return summary


def _notes(run: FolderRun, work: Mapping[str, PrelabelItem]) -> list[str]:
    if not isinstance(run.prompts, PromptFile):
        return []
    notes = list(run.prompts.notes)
    if missing := len(images_of(run.folder)) - len(work):
        notes.append(f"{missing} images have no entry in the prompts and were left out.")
    if unused := run.prompts.unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        notes.append(f"{len(unused)} entries of the prompts name no image of the folder: {shown}")
    return notes


def _item(run: FolderRun, path: Path) -> PrelabelItem | None:
    key = path.relative_to(run.folder).as_posix()
    image = ImageRef(url=str(path.resolve()))
    if isinstance(run.prompts, Everything):
        return PrelabelItem(key=key, image=image, everything=run.prompts)
    found = run.prompts.of(str(path), key)
    if found is None:
        return None
    return PrelabelItem(key=key, image=image, objects=found.objects, width=found.width, height=found.height)


def _task(run: FolderRun, key: str, made: dict[str, Any]) -> dict[str, Any]:
    path = quote(f"{run.folder.resolve().name}/{key}")
    url = run.url.replace("{path}", path).replace("{name}", quote(Path(key).name))
    return {"data": {run.controls.config.key: url}, "predictions": [made]}


def _write(out: Path, tasks: list[dict[str, Any]]) -> None:
    """The whole file or none of it."""
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(tasks, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def folder_config(labels: Iterable[str], *, polygons: bool) -> Controls:
    """The controls of `bald-sam config-xml`, for tasks that are imported into a project with that config."""
    labels = tuple(labels)
    config = LabelingConfig(
        image="image",
        key="image",
        mask=Control("brush", "brushlabels", smart=False, labels=labels),
        points=(),
        boxes=(),
        proposal=Control("next", "keypointlabels", smart=False, labels=(NEXT_INSIDE, NEXT_OUTSIDE)),
    )
    return Controls(config, ("polygon", "polygonlabels", labels) if polygons else None)
