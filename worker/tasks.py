"""The job functions. JSON in, JSON out; a fault that can be foreseen is a `Failure`, not an exception."""

from __future__ import annotations

import gc
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from rq.timeouts import BaseTimeoutException

from worker import brush_rle
from worker.backbones.checkpoints import CheckpointError
from worker.contract import (
    Box,
    Click,
    EmbedJob,
    EmbedResult,
    Failure,
    ImageRef,
    Message,
    NotQuickError,
    Prompts,
    Proposal,
    SegmentJob,
    SegmentResult,
)
from worker.decode import decode, decode_session
from worker.encode import Embedding, encode, encode_window
from worker.frame import Window
from worker.images.errors import ImageError
from worker.images.fetch import fetch
from worker.images.pixels import decode_image
from worker.images.urls import LABEL_STUDIO_PATHS
from worker.masks import to_mask
from worker.preemption import before_long_work
from worker.runtime import NotConfiguredError, Runtime, runtime
from worker.zoom import shrunk

log = logging.getLogger(__name__)
J = TypeVar("J", bound=Message)
#: An image that could not be read again is not asked for by each click: a server that hangs would hold all of them.
TRY_AGAIN_S = 60.0
REMOTE = ("http:", "https:", "s3:", "gs:", "azure-blob:")


class JobError(Exception):
    """The job itself is wrong; `failure` says how."""

    def __init__(self, error: str, hint: str, status: int) -> None:
        super().__init__(error)
        self.failure = Failure(error=error, hint=hint, status=status)


class Timings:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = 1000 * (time.perf_counter() - start)
            self.stages[name] = round(self.stages.get(name, 0.0) + spent, 3)


def segment(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one click: `SegmentJob` to `SegmentResult` or `Failure`."""
    return answer(SegmentJob, job, _segment)


def embed(job: dict[str, Any]) -> dict[str, Any]:
    """Encode images ahead of the first click: `EmbedJob` to `EmbedResult` or `Failure`."""
    return answer(EmbedJob, job, _embed)


def answer(kind: type[J], job: dict[str, Any], do: Callable[[J, Runtime], Message]) -> dict[str, Any]:
    """What `do` says to a job of this kind, as JSON; a `Failure` for what goes wrong."""
    try:
        return _with_memory(do, kind.model_validate(job), runtime()).model_dump(mode="json")
    except (BaseTimeoutException, NotQuickError):
        raise  # the worker's own: it must see it
    except Exception as error:
        return failure(error).model_dump(mode="json")


def _with_memory(do: Callable[[J, Runtime], Message], job: J, current: Runtime) -> Message:
    """Run a job; when the device is out of memory, free the caches and try once more, and then on the processor."""
    try:
        return do(job, current)
    except torch.OutOfMemoryError:
        log.warning("The device ran out of memory; trying once more with empty caches.")
    gc.collect()
    current.free_memory()
    try:
        return do(job, current)
    except torch.OutOfMemoryError:
        if current.backbone.device.type == "cpu":
            raise
        log.warning("The device is still out of memory; this job runs on the processor, which is slow.")
    return do(job, current.on_processor)


def failure(error: Exception) -> Failure:
    """What went wrong, in words for a person."""
    if isinstance(error, JobError):
        return error.failure
    if isinstance(error, ImageError):
        return Failure(error=error.error, hint=error.hint, status=error.status)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Failure(
            error=f"The job is not valid: {where}: {first['msg']}.",
            hint="Run the same version of bald-sam in the web process and in every worker.",
            status=422,
        )
    if isinstance(error, CheckpointError | NotConfiguredError):
        return Failure(error=str(error), hint="See `bald-sam models list` for what is on this machine.", status=503)
    if isinstance(error, torch.OutOfMemoryError):
        return Failure(
            error="The device ran out of memory.",
            hint="Use a smaller backbone, lower BALD_SAM_CACHE_MB, or stop what else runs on the device.",
            status=503,
        )
    incident = uuid.uuid4().hex[:8]
    log.error("Job failed, incident %s", incident, exc_info=error)
    return Failure(
        error=f"The worker could not answer ({type(error).__name__}).",
        hint=f"The worker's log has the details under incident {incident}.",
        status=500,
    )


def _segment(job: SegmentJob, current: Runtime) -> SegmentResult:
    timings = Timings()
    try:
        backbone, proposer = current.backbone, current.proposer_of(job.image.project)
    except ValueError as error:
        raise JobError(str(error), "Correct the setting and start the worker again.", 503) from error
    embedding, key = _embedding(job.image, current, timings)
    prompts = in_image(job.prompts, (job.height, job.width), embedding.original_size)
    with timings.stage("decode"):
        look = partial(_look, job.image, key, embedding.original_size, current, timings)
        decoded = decode_session(backbone, embedding, prompts, current.logits, key, look)
    if "zoom" in timings.stages:
        timings.stages["decode"] = round(timings.stages["decode"] - timings.stages["zoom"], 3)
    logits, proposal, stopped = decoded.logits, None, None
    with timings.stage("propose"):
        try:
            decision = proposer.propose(
                decoded,
                prompts,
                strategy=job.strategy,
                redecode=partial(decode, backbone, decoded.embedding),
            )
        except ValueError as error:
            raise JobError(str(error), "Choose another strategy.", 422) from error
        logits = decision.logits
        if job.propose:
            proposal, stopped = decision.proposal, decision.stopped
    with timings.stage("mask"):
        mask = to_mask(logits, decoded.frame, prompts, (job.height, job.width))
    with timings.stage("rle"):
        rle = brush_rle.encode_bytes(mask)
    return SegmentResult(
        width=job.width,
        height=job.height,
        rle=rle,
        area=int(np.count_nonzero(mask)),
        # SAM's head is not bounded, and Label Studio shows this as a score.
        predicted_iou=min(max(decoded.predicted_iou, 0.0), 1.0),
        proposal=_in_job(proposal, job, embedding),
        stopped=stopped,
        model_version=proposer.model_version,
        timings=timings.stages,
    )


def _embed(job: EmbedJob, current: Runtime) -> EmbedResult:
    done, failed = 0, {}
    for image in job.images:
        try:
            _embedding(image, current, Timings())
            done += 1
        except ImageError as error:
            failed[image.url] = f"{error.error} {error.hint}"
    return EmbedResult(done=done, failed=failed)


def _embedding(image: ImageRef, current: Runtime, timings: Timings) -> tuple[Embedding, str]:
    """The image's embedding and its cache key; a URL that was seen lately is not fetched again."""
    backbone, cache = current.backbone, current.embeddings
    remembered = _is_remote(image.url)
    if remembered:
        with timings.stage("look_up"):
            known = cache.key_of_url(image.url, backbone)
            embedding = cache.get(known, backbone.device) if known else None
        if known is not None and embedding is not None:
            return embedding, known
        before_long_work()
    with timings.stage("fetch"):
        data = fetch(image, current.options)
    key = cache.key(data, backbone)

    def compute() -> Embedding:
        with timings.stage("decode_image"):
            pixels = decode_image(data, current.options)
        if backbone.zoom:
            _keep_pixels(key, pixels, current)
        with current.encoding, timings.stage("encode"):
            return encode(backbone, pixels)

    with timings.stage("embedding"):
        embedding = cache.get_or_encode(key, backbone.device, compute)
    if remembered:
        cache.remember_url(image.url, backbone, key)
    return embedding, key


def _look(
    image: ImageRef, key: str, size: tuple[int, int], current: Runtime, timings: Timings, window: Window
) -> Embedding | None:
    """The embedding of a part of the image under `key`, which has `size`; None where it cannot be had any more."""

    def compute() -> Embedding | None:
        pixels = current.pixels.get(key)
        if pixels is None:
            if time.monotonic() < (current.out_of_reach.get(key) or 0.0):
                return None
            try:
                data = fetch(image, current.options)
                if current.embeddings.key(data, current.backbone) != key:
                    return None  # another image is there now
                pixels = _keep_pixels(key, decode_image(data, current.options), current)
            except ImageError as error:
                log.warning("An image is not looked at from near: %s", error.error)
                current.out_of_reach.put(key, time.monotonic() + TRY_AGAIN_S, 200)
                return None
        with current.encoding:
            return encode_window(current.backbone, pixels, window, size)

    with timings.stage("zoom"):
        return current.embeddings.window_or_encode(key, window, compute)


def _keep_pixels(key: str, image: NDArray[np.uint8], current: Runtime) -> NDArray[np.uint8]:
    pixels = shrunk(image)
    current.pixels.put(key, pixels, pixels.nbytes)
    return pixels


def _is_remote(url: str) -> bool:
    """Whether fetching takes a request. Local files are read each time: they may change, and it costs little."""
    return url.startswith(REMOTE) or LABEL_STUDIO_PATHS.search("/" + url) is not None or url.startswith("upload/")


def in_image(prompts: Prompts, frame: tuple[int, int], size: tuple[int, int]) -> Prompts:
    """Prompts in pixels of an image of `frame` (height, width), in pixels of the image itself, which has `size`.

    What lies outside, as on a border, moves to the border. Raises JobError where nothing is left to segment.
    """
    height, width = size
    to_x, to_y = width / frame[1], height / frame[0]

    def point(x: float, y: float) -> tuple[float, float]:
        return min(max(x * to_x, 0.0), float(width)), min(max(y * to_y, 0.0), float(height))

    clicks, box = [], None
    for click in prompts.clicks:
        x, y = point(click.x, click.y)
        clicks.append(Click(x=x, y=y, positive=click.positive))
    if prompts.box is not None:
        (x0, y0), (x1, y1) = point(prompts.box.x0, prompts.box.y0), point(prompts.box.x1, prompts.box.y1)
        if x0 >= x1 or y0 >= y1:
            raise JobError("The box has no area inside the image.", "Draw the box on the image.", 422)
        box = Box(x0=x0, y0=y0, x1=x1, y1=y1)
    if not clicks and box is None:
        raise JobError("There is no click and no box.", "Click on the object, or draw a box around it.", 422)
    return Prompts(clicks=tuple(clicks), box=box)


def _in_job(proposal: Proposal | None, job: SegmentJob, embedding: Embedding) -> Proposal | None:
    """A proposal in pixels of the job."""
    height, width = embedding.original_size
    if proposal is None or (height, width) == (job.height, job.width):
        return proposal
    return proposal.model_copy(update={"x": proposal.x * job.width / width, "y": proposal.y * job.height / height})
