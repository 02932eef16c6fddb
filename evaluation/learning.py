"""Learn a head from the masks of a project: the job behind START_TRAINING and `bald-sam train --project`.

A head learns from all masks, and is judged on all of them, up to a number: tasks are divided into folds by a hash of
their number, once and for all, and on each fold plays what was learnt from the others, in full sessions with the exact
simulated user and the strategy of the settings. These are kept with the head (`Head.unseen`), so that its successor is
compared with what has not seen those tasks either.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import redis
import torch
from numpy.typing import NDArray

from evaluation import metrics
from evaluation.calibration import calibrated, with_head
from evaluation.session import Session
from worker import brush_rle
from worker.contract import PROGRESS_KEY, HeadChoice, LabelledObject, Prompts, TrainJob, TrainResult
from worker.decode import Decoded
from worker.encode import Embedding, encode_resized, resize
from worker.head.fit import FitOptions
from worker.head.store import Head, save_head
from worker.images.errors import ImageError
from worker.images.fetch import fetch
from worker.images.pixels import decode_image
from worker.preemption import give_way
from worker.runtime import Runtime
from worker.tasks import JobError, answer, in_image
from worker.training import SessionOptions, Visited, collect, fit_head
from worker.zoom import looker

log = logging.getLogger(__name__)

Mask = NDArray[np.bool_]
Report = Callable[[str, int, int], None]

#: What tasks are divided into; and the least number of images to learn from.
FOLDS = 4
LEAST_IMAGES = 8
#: Objects that are played: more make the answer surer and the training longer.
MOST_JUDGED = 60
MOST_CALIBRATED = 24
#: States of one session that are learnt from.
STATES = 6
#: Images that are read ahead of the model.
READ_AHEAD = 3


def train(job: dict[str, Any]) -> dict[str, Any]:
    """The job function: `TrainJob` to `TrainResult` or `Failure`."""
    return answer(TrainJob, job, learn)


def learn(job: TrainJob, current: Runtime, *, report: Report | None = None) -> TrainResult:
    """Fit a head, calibrate it, judge it on tasks held out in turn, keep it, and use it if it is better.

    `report(stage, done, total)`: called as it goes on; without it, progress goes to Redis and the log. Clicks are let
    through all the while. Raises JobError when there is too little to learn from.
    """
    began = time.monotonic()
    report = report or _Reporter(job.project, current)
    fold_of = folds(job)
    backbone, before = current.backbone, current.proposer_of(job.project)
    skipped: dict[str, str] = {}

    def sessions(objects: Sequence[LabelledObject], stage: str) -> Iterator[tuple[str, Session]]:
        for done, one in enumerate(_read(objects, current, skipped), 1):
            yield one.name, _PatientSession(backbone, before, one.embedding, _NO_IMAGE, one.truth, None, one.look)
            report(stage, done, len(objects))

    options = SessionOptions(clicks=STATES, seed=job.seed)
    reading = _reported(_read(job.objects, current, skipped), lambda done: report("learning", done, len(job.objects)))
    pixels = collect(backbone, reading, options)
    # Not the project's own: it was learnt from some of these masks, and they would count twice.
    start = current.proposer.head
    image_of = {_name(one): _image(one) for one in job.objects}
    notes = {**job.notes, "project": job.project, "tasks": len(set(image_of.values()))}
    head = fit_head(backbone, pixels, options, FitOptions(), start=start, notes=notes)
    few = _spread(job.objects, MOST_CALIBRATED)
    head, _ = calibrated(backbone, head, partial(sessions, few), clicks=job.clicks, seed=job.seed)
    # What was chosen with all masks, how much the start counts and when to stop, is a few numbers: it stays.
    fit = FitOptions(**head.notes["fit"])
    fold = torch.tensor([fold_of[pixels.names[number]] for number in pixels.objects.tolist()])
    parts = (pixels.where(fold != one) for one in range(FOLDS))  # one at a time: each is most of the pixels again
    fitted = [fit_head(backbone, part, options, fit, start=start) if len(part.objects) else start for part in parts]
    head = replace(head, unseen_by=tuple(one.posterior for one in fitted))
    judging = sessions(_spread(job.objects, MOST_JUDGED), "judging")
    pairs = [(before.head.unseen(one), head.unseen(one)) for one in range(FOLDS)]
    judged = list(judge(lambda name: pairs[fold_of[name]], judging, clicks=job.clicks))
    if not judged:
        raise JobError("None of the images can be read.", _first(skipped), 422)
    gain, error = compare([(image_of[name], new - old) for name, (old, new) in judged])
    auc_before, auc = (float(np.mean([aucs[which] for _, aucs in judged])) for which in (0, 1))
    figures = {"auc": auc, "auc_before": auc_before, "before": before.head.id, "gain": gain, "error": error}
    name = current.heads.new_name(f"project-{job.project}")
    images = len({image_of[name] for name, _ in judged})
    held = {"objects": len(judged), "images": images, **figures}
    save_head(replace(head, notes={**head.notes, "held_out": held}), current.heads.folder / name / "head.safetensors")
    current.heads.publish(name)
    used, reason = decide(gain, error, current.heads.in_use(fresh=True).of(job.project), force=job.force)
    if used:
        current.heads.use(name, job.project)
    log.info("project %d: %s, %s", job.project, name, reason)
    return TrainResult(
        project=job.project,
        head=name,
        used=used,
        reason=reason,
        objects=int(head.notes["objects"]),
        logged=sum(bool(one.states) for one in job.objects),
        held_out=len(judged),
        images_held_out=images,
        skipped=skipped,
        seconds=round(time.monotonic() - began, 1),
        **figures,
    )


def folds(job: TrainJob) -> dict[str, int]:
    """The fold, 0 to `FOLDS` - 1, of each object by name. Raises JobError if there are too few images."""
    count = len({_image(one) for one in job.objects})
    if count < LEAST_IMAGES:
        raise JobError(
            f"Project {job.project} has masks on {count} images; learning needs at least {LEAST_IMAGES}.",
            "Annotate and submit more; about 50 make a difference.",
            422,
        )

    def place(image: str) -> int:
        return hashlib.sha256(f"{job.project}:{image}".encode()).digest()[0] * FOLDS // 256

    return {_name(one): place(_image(one)) for one in job.objects}


def judge(
    heads: Callable[[str], Sequence[Head]], sessions: Iterable[tuple[str, Session]], *, clicks: int
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """For each session its name, and the AUC (IoU over clicks, 0 to 1) that each head for it reaches from one start."""
    for name, session in sessions:
        aucs = []
        for head in heads(name):
            mine = replace(session, proposer=with_head(session.proposer, head))
            rows = mine.play(session.proposer.strategy.name, 0, clicks)
            aucs.append(metrics.auc(np.array([row["iou"] for row in rows], dtype=float)))
        yield name, tuple(aucs)


def compare(gains: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Mean of the objects' gains and its standard error; objects of one image (named first) are not independent."""
    values = np.array([gain for _, gain in gains])
    images = sorted({image for image, _ in gains})
    mean = float(values.mean())
    # Deviations summed within images: the cluster-robust standard error of a mean.
    sums = np.array([sum(gain - mean for image, gain in gains if image == one) for one in images])
    correction = len(images) / max(len(images) - 1, 1)
    return mean, float(np.sqrt(correction * np.square(sums).sum()) / len(values))


def decide(gain: float, error: float, choice: HeadChoice, *, force: bool) -> tuple[bool, str]:
    """Whether a new head is used, and why in words. Better means: by more than the standard error of the difference."""
    figures = f"AUC on tasks that neither has seen: {gain:+.4f} ± {error:.4f} against the head in use"
    if force:
        return True, f"it is used because that was asked for. {figures}."
    if choice.pinned:
        return False, f"it is kept but not used: the head of this project is pinned. {figures}."
    if gain > error:
        return True, f"it is used from now on. {figures}."
    return False, f"it is kept but not used: it is not clearly better. {figures}."


# --- reading --------------------------------------------------------------------------------------------------------

_NO_IMAGE = np.zeros((0, 0, 3), np.uint8)


class _PatientSession(Session):
    """A session that lets clicks through between its own."""

    def decode(self, prompts: Prompts, before: Decoded | None = None) -> Decoded:
        give_way()
        return super().decode(prompts, before)


@dataclass(frozen=True)
class _Pixels:
    """What the reading thread makes of an object: its mask at the image's size, the image, also as the encoder wants
    it."""

    truth: Mask
    image: NDArray[np.uint8]
    resized: NDArray[np.uint8]
    original_size: tuple[int, int]
    key: str


def _read(objects: Sequence[LabelledObject], current: Runtime, skipped: dict[str, str]) -> Iterator[Visited]:
    """Each object with its embedding, in the order of their images; what cannot be read goes to `skipped`, in words."""
    backbone = current.backbone
    ordered = sorted(objects, key=_image)
    known: tuple[str, Embedding] | None = None
    with ThreadPoolExecutor(1, "train-read", lambda: torch.set_num_threads(1)) as reader:
        ahead: list[Future[_Pixels]] = []
        try:
            for number, one in enumerate(ordered):
                while len(ahead) < len(ordered) and len(ahead) <= number + READ_AHEAD:
                    ahead.append(reader.submit(_load, ordered[len(ahead)], current))
                reading, ahead[number] = ahead[number], Future()
                while not wait([reading], 0.02).done:
                    give_way()
                try:
                    pixels = reading.result()
                    frame = (one.height, one.width)
                    states = tuple(in_image(state, frame, pixels.original_size) for state in one.states)
                except (ImageError, JobError, ValueError) as error:
                    skipped[one.image.url] = str(error)
                    continue
                if known is None or known[0] != pixels.key:
                    embedding = current.embeddings.get(pixels.key, backbone.device, remember=False)
                    if embedding is None:
                        with current.encoding:
                            embedding = encode_resized(backbone, pixels.resized, pixels.original_size)
                    known = pixels.key, embedding
                yield Visited(_name(one), pixels.truth, known[1], states, looker(backbone, pixels.image))
        finally:
            reader.shutdown(wait=False, cancel_futures=True)


def _load(one: LabelledObject, current: Runtime) -> _Pixels:
    data = fetch(one.image, current.options)
    image = decode_image(data, current.options)
    try:
        truth = brush_rle.decode(list(zlib.decompress(base64.b64decode(one.mask))), one.height, one.width)
    except (ValueError, zlib.error) as error:
        raise JobError(f"The mask {one.region} cannot be read ({error}).", "Draw it again.", 422) from error
    height, width = image.shape[:2]
    if truth.shape != (height, width):
        truth = cv2.resize(truth.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    if not truth.any():
        raise JobError(f"The mask {one.region} is empty.", "Delete it, or draw it again.", 422)
    key = current.embeddings.key(data, current.backbone)
    return _Pixels(truth, image, resize(current.backbone, image), (height, width), key)


def _name(one: LabelledObject) -> str:
    """Region ids are unique in their task alone: annotations may be copied."""
    return f"{_image(one)}/{one.region}"


def _image(one: LabelledObject) -> str:
    """What is split by: the task, or where there is none the address."""
    return str(one.image.url if one.image.task is None else one.image.task)


def _spread(objects: Sequence[LabelledObject], most: int) -> list[LabelledObject]:
    """At most `most` of the objects, evenly over the list."""
    if len(objects) <= most:
        return list(objects)
    return [objects[int(position)] for position in np.linspace(0, len(objects) - 1, most).round()]


def _first(skipped: dict[str, str]) -> str:
    return next(iter(skipped.values()), "Look at the tasks' images.")


def _reported(examples: Iterable[Visited], tell: Callable[[int], None]) -> Iterator[Visited]:
    for number, example in enumerate(examples, 1):
        yield example
        tell(number)


class _Reporter:
    """Progress to Redis, where somebody may look, and now and then to the log."""

    def __init__(self, project: int, current: Runtime) -> None:
        self._project, self._client = project, current.redis
        self._logged = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._client is not None:
            value = json.dumps({"stage": stage, "done": done, "total": total})
            try:
                self._client.set(f"{PROGRESS_KEY}{self._project}", value, ex=600)
            except redis.RedisError as error:
                log.debug("progress is not told: %s", error)
        if done == total or time.monotonic() - self._logged > 10:
            self._logged = time.monotonic()
            log.info("project %d: %s, %d of %d objects", self._project, stage, done, total)
