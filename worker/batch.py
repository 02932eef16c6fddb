"""Pre-labelling: many images, the prompts of their objects given, none or to be found.

Reading an image, encoding it, and making masks of its objects happen at the same time, for different images. A large
encoder runs on the caller's thread, and lets clicks through between any two small steps (`worker.preemption`); the
decoder and what follows run beside it, and stand by meanwhile. A small one on a CPU has too little to do between two
steps for several cores: each core sees an image of its own through, and the caller's thread is there for clicks.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rq.timeouts import BaseTimeoutException

from worker.backbones import Backbone
from worker.contract import (
    Failure,
    PrelabelFailure,
    PrelabelImage,
    PrelabelItem,
    PrelabelJob,
    PrelabelOptions,
    PrelabelResult,
)
from worker.encode import Embedding, encode_resized, resize
from worker.frame import Window
from worker.images.fetch import fetch
from worker.images.pixels import decode_image
from worker.objects import decide, regions
from worker.preemption import ASK_EVERY_S, give_way, work_beside
from worker.runtime import Runtime
from worker.tasks import answer, failure
from worker.zoom import Look, looker

log = logging.getLogger(__name__)

#: Threads that read images ahead of the model. Beside a model on the processor they wait for the network most of the
#: time; one on a GPU takes images faster than two of them unpack.
READERS = 2
READERS_OF_GPU = 8
#: Images that each of them reads ahead.
READ_AHEAD = 2
#: Images whose masks may wait to be made.
FINISH_BEHIND = 4
#: Encoders of images of at most this side, pixels, are small.
SMALL_INPUT = 512
#: Images that are seen through at the same time: two at least, as one leaves the processor now and then, and no more
#: than can go on without Python's lock.
MIN_LANES, MAX_LANES = 2, 8

Answer = PrelabelImage | PrelabelFailure
T = TypeVar("T")


def prelabel(job: dict[str, Any]) -> dict[str, Any]:
    """The job function: `PrelabelJob` to `PrelabelResult`, or `Failure` where no image could be done at all."""
    return answer(PrelabelJob, job, _prelabel)


def _prelabel(job: PrelabelJob, current: Runtime) -> PrelabelResult:
    answers = list(run(job.items, job.options, current))
    return PrelabelResult(
        images=tuple(one for one in answers if isinstance(one, PrelabelImage)),
        failed=tuple(one for one in answers if isinstance(one, PrelabelFailure)),
        model_version=current.proposer_of(job.items[0].image.project if job.items else None).model_version,
    )


def run(items: Iterable[PrelabelItem], options: PrelabelOptions, current: Runtime) -> Iterator[Answer]:
    """One answer for each item, in order, as soon as it is made. `items` is read a few items ahead.

    Raises what keeps every image from being done (no weights, an unknown strategy); what is wrong with one image is
    its `PrelabelFailure`.
    """
    backbone, _ = current.backbone, current.proposer
    lanes = _lanes(backbone)
    threads = 1 if lanes else max(1, torch.get_num_threads() // 2)
    behind = max(FINISH_BEHIND, 2 * lanes)
    reading = _readers(backbone)
    with (
        ThreadPoolExecutor(reading, "prelabel-read", work_beside) as readers,
        ThreadPoolExecutor(max(lanes, 1), "prelabel-finish", work_beside, (threads,)) as others,
    ):
        finishing: deque[Future[Answer] | PrelabelFailure] = deque()
        try:
            for item, pixels in _ahead(
                items, lambda item: readers.submit(_read, item, options, current), READ_AHEAD * reading
            ):
                if lanes:
                    finishing.append(others.submit(_see_through, item, pixels, options, current))
                else:
                    finishing.append(_attempt(item, pixels, options, current, others))
                while finishing and (len(finishing) > behind or _is_done(finishing[0])):
                    yield _result(finishing.popleft())
            while finishing:
                yield _result(finishing.popleft())
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            others.shutdown(wait=False, cancel_futures=True)


def _readers(backbone: Backbone) -> int:
    return READERS if backbone.device.type == "cpu" else min(READERS_OF_GPU, max(READERS, os.cpu_count() or 1))


def _lanes(backbone: Backbone) -> int:
    """How many images are seen through at the same time, each by one thread; 0: the encoder runs on the caller's."""
    small = backbone.device.type == "cpu" and backbone.image_size <= SMALL_INPUT
    return min(max(torch.get_num_threads(), MIN_LANES), MAX_LANES) if small else 0


@dataclass(frozen=True)
class _Read:
    """An image that was read: its embedding if it is known, else its pixels as the encoder wants them; `look` where
    objects are to be looked at from near."""

    embedding: Embedding | None
    resized: NDArray[np.uint8] | None
    original_size: tuple[int, int]
    key: str
    look: Look | None = None


def _ahead(
    items: Iterable[PrelabelItem], read: Callable[[PrelabelItem], Future[_Read]], count: int
) -> Iterator[tuple[PrelabelItem, Future[_Read]]]:
    """Each item with its reading, which began `count` items earlier."""
    waiting: deque[tuple[PrelabelItem, Future[_Read]]] = deque()
    for item in items:
        waiting.append((item, read(item)))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _read(item: PrelabelItem, options: PrelabelOptions, current: Runtime) -> _Read:
    data = fetch(item.image, current.options)
    backbone = current.backbone
    key = current.embeddings.key(data, backbone)
    known = current.embeddings.get(key, backbone.device, remember=False)
    zoom = options.zoom and backbone.zoom
    if known is not None and not zoom:
        return _Read(known, None, known.original_size, key)
    image = decode_image(data, current.options)
    height, width = image.shape[:2]
    resized = resize(backbone, image) if known is None else None
    return _Read(known, resized, (height, width), key, _look(current, image) if zoom else None)


def _look(current: Runtime, image: NDArray[np.uint8]) -> Look:
    encode_part, lanes = looker(current.backbone, image), _lanes(current.backbone)

    def look(window: Window) -> Embedding | None:
        with nullcontext() if lanes else current.encoding:
            return encode_part(window)

    return look


def _attempt(
    item: PrelabelItem,
    reading: Future[_Read],
    options: PrelabelOptions,
    current: Runtime,
    finishers: ThreadPoolExecutor,
) -> Future[Answer] | PrelabelFailure:
    try:
        image = _patiently(reading)
        with current.encoding:
            embedding = _once_more(lambda: _encode(image, options, current), current)
    except BaseTimeoutException:
        raise  # the worker's own: it must see it
    except Exception as error:
        return _failed(item, error)
    return finishers.submit(_finish, item, embedding, options, current, image.look)


def _see_through(item: PrelabelItem, reading: Future[_Read], options: PrelabelOptions, current: Runtime) -> Answer:
    """Everything after reading, on a thread of `_lanes`. Small encoders need no turn: their memory is small too."""
    try:
        image = reading.result()
        embedding = _encode(image, options, current)
    except Exception as error:
        return _failed(item, error)
    return _finish(item, embedding, options, current, image.look)


def _patiently(future: Future[T]) -> T:
    """What a thread beside this one makes; clicks are let through meanwhile."""
    while not future.done():
        give_way()
        wait([future], ASK_EVERY_S)
    return future.result()


def _once_more(work: Callable[[], T], current: Runtime) -> T:
    """`work`, and again where the device had no memory for it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        log.warning("The device ran out of memory; trying once more with empty caches.")
        current.free_memory()
        return work()


def _failed(item: PrelabelItem, error: Exception) -> PrelabelFailure:
    words: Failure = failure(error)
    return PrelabelFailure(key=item.key, error=words.error, hint=words.hint)


def _is_done(one: Future[Answer] | PrelabelFailure) -> bool:
    return isinstance(one, PrelabelFailure) or one.done()


def _result(one: Future[Answer] | PrelabelFailure) -> Answer:
    return one if isinstance(one, PrelabelFailure) else _patiently(one)


@torch.inference_mode()
def _encode(image: _Read, options: PrelabelOptions, current: Runtime) -> Embedding:
    give_way()
    if image.embedding is not None:
        return image.embedding
    assert image.resized is not None
    embedding = encode_resized(current.backbone, image.resized, image.original_size)
    if options.keep:
        # Not in the memory: annotators' images are there.
        current.embeddings.put(image.key, embedding, remember=False)
    return embedding


def _finish(
    item: PrelabelItem, embedding: Embedding, options: PrelabelOptions, current: Runtime, look: Look | None
) -> Answer:
    """Objects, masks at full size, and their brush or outlines. Runs beside the encoder."""
    try:
        with torch.inference_mode():
            objects = _once_more(lambda: decide(item, embedding, options, current, look), current)
            return regions(item, embedding.original_size, objects, options)
    except Exception as error:
        return _failed(item, error)
