"""Simulated clicks in training, in pixels of the low-resolution mask; `to_frame` takes them to SAM's input frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Start = NDArray[np.float64]  # 1 x 2: a click; 2 x 2: the corners of a box
T = TypeVar("T")


def to_frame(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """(x, y) of low-resolution pixels to pixels of the input frame (twice as fine), as SAM counts them: SAM adds the
    half pixel itself, so the centre of low-resolution pixel j, at 2j + 1, is written 2j + 0.5."""
    return xy * 2 + 0.5


def inside(region: Mask | NDArray[np.uint8], rng: np.random.Generator, *, centre: bool) -> tuple[int, int]:
    """(x, y): the pixel farthest from the border of `region`, or a random one not too near to it."""
    padded = cv2.copyMakeBorder(region.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    if centre:
        at = int(depth.argmax())
    else:
        pixels = np.flatnonzero(depth.ravel() > rng.uniform(0, 0.5) * depth.max())
        at = int(pixels[rng.integers(len(pixels))])
    return at % region.shape[1], at // region.shape[1]


def largest(region: Mask) -> NDArray[np.uint8]:
    """The largest 8-connected component, 1 in it and 0 elsewhere; all 0 if `region` is empty."""
    count, components, stats, _ = cv2.connectedComponentsWithStats(region.view(np.uint8), connectivity=8)
    if count < 2:
        return region.view(np.uint8)
    return (components == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())).view(np.uint8)


def correction(truth: Mask, mask: Mask, rng: np.random.Generator, *, centre: bool) -> tuple[int, int, bool]:
    """The next click (x, y, positive): in the largest component of the missed or of the wrongly covered pixels."""
    missed, wrong = largest(truth > mask), largest(mask > truth)
    positive = cv2.countNonZero(missed) >= cv2.countNonZero(wrong)
    region = missed if positive else wrong
    x0, y0, width, height = cv2.boundingRect(region)
    if not width:
        region, positive = truth.view(np.uint8), True
        x0, y0, width, height = cv2.boundingRect(region)
    x, y = inside(region[y0 : y0 + height, x0 : x0 + width], rng, centre=centre)
    return x0 + x, y0 + y, positive


class Clickers:
    """Processes that click on the objects of a batch at once: beside a GPU, one alone would take as long as the rest
    of the step. None of them with `count` 0: the clicks are made where they are asked for."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.executor = ProcessPoolExecutor(count, initializer=cv2.setNumThreads, initargs=(0,)) if count else None
        if self.executor:  # before there is a GPU in this process, which is forked
            self.executor.submit(int).result()

    def starts(self, truths: Mask, rng: np.random.Generator, *, box_share: float, centre: bool) -> Iterable[Start]:
        """The first prompt of each of N objects (truths N x H x W): a box about a share of them, else a click; 40 % of
        the clicks in the middle, or all with `centre`."""
        boxed, middles = rng.random(len(truths)) < box_share, centre | (rng.random(len(truths)) < 0.4)
        return self._ask(_start, [truths], boxed, middles, rng=rng)

    def corrections(
        self, truths: Mask, masks: Mask, rng: np.random.Generator, *, centre: bool
    ) -> Iterable[tuple[int, int, bool]]:
        """`correction` of N objects (truths and masks N x H x W); half of them in the middle of their region, or all
        with `centre`."""
        return self._ask(_correction, [truths, masks], centre | (rng.random(len(truths)) < 0.5), rng=rng)

    def _ask(self, what: Callable[..., T], masks: list[Mask], *settings: Any, rng: np.random.Generator) -> Iterable[T]:
        columns = [*(of.tolist() for of in settings), rng.integers(2**63, size=len(masks[0])).tolist()]
        if self.executor is None:
            return map(what, *masks, *columns)
        bits = (np.packbits(of, axis=-1) for of in masks)  # an eighth to hand over
        chunk = -(-len(masks[0]) // self.count)
        return self.executor.map(partial(_unpacked, what, len(masks)), *bits, *columns, chunksize=chunk)


def _start(truth: Mask, boxed: bool, centre: bool, seed: int) -> Start:
    rng = np.random.default_rng(seed)
    return box_around(truth, rng) if boxed else np.array([inside(truth, rng, centre=centre)], float)


def _correction(truth: Mask, mask: Mask, centre: bool, seed: int) -> tuple[int, int, bool]:
    return correction(truth, mask, np.random.default_rng(seed), centre=centre)


def _unpacked(what: Callable[..., T], masks: int, *arguments: Any) -> T:
    return what(*(np.unpackbits(bits, axis=-1).view(bool) for bits in arguments[:masks]), *arguments[masks:])


def box_around(truth: Mask, rng: np.random.Generator) -> NDArray[np.float64]:
    """The two corners (2 x 2, (x, y)) of a box about the object, each side off by up to a tenth."""
    ys, xs = np.nonzero(truth)
    low, high = np.array([xs.min(), ys.min()], float), np.array([xs.max(), ys.max()], float)
    jitter = (high - low + 1) * 0.1
    corners = np.stack([low + rng.uniform(-jitter, jitter), high + rng.uniform(-jitter, jitter)])
    return np.clip(corners, 0, np.array(truth.shape[::-1]) - 1.0)
