"""Simulated clicks in training, in pixels of the low-resolution mask; `to_frame` takes them to SAM's input frame."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def to_frame(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """(x, y) of low-resolution pixels to pixels of the input frame (twice as fine), as SAM counts them: SAM adds the
    half pixel itself, so the centre of low-resolution pixel j, at 2j + 1, is written 2j + 0.5."""
    return xy * 2 + 0.5


def inside(region: Mask, rng: np.random.Generator, *, centre: bool) -> tuple[int, int]:
    """(x, y): the pixel farthest from the border of `region`, or a random one not too near to it."""
    depth = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    if centre:
        at = int(depth.argmax())
    else:
        pixels = np.flatnonzero(depth.ravel() > rng.uniform(0, 0.5) * depth.max())
        at = int(pixels[rng.integers(len(pixels))])
    return at % region.shape[1], at // region.shape[1]


def largest(region: Mask) -> Mask:
    """The largest 8-connected component; all False if `region` is."""
    count, components, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    if count < 2:
        return region
    return np.asarray(components == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def correction(truth: Mask, mask: Mask, rng: np.random.Generator, *, centre: bool) -> tuple[int, int, bool]:
    """The next click (x, y, positive): in the largest component of the missed or of the wrongly covered pixels."""
    missed, wrong = largest(truth & ~mask), largest(mask & ~truth)
    positive = bool(missed.sum() >= wrong.sum())
    region = missed if positive else wrong
    if not region.any():
        region, positive = truth, True
    return *inside(region, rng, centre=centre), positive


def box_around(truth: Mask, rng: np.random.Generator) -> NDArray[np.float64]:
    """The two corners (2 x 2, (x, y)) of a box about the object, each side off by up to a tenth."""
    ys, xs = np.nonzero(truth)
    low, high = np.array([xs.min(), ys.min()], float), np.array([xs.max(), ys.max()], float)
    jitter = (high - low + 1) * 0.1
    corners = np.stack([low + rng.uniform(-jitter, jitter), high + rng.uniform(-jitter, jitter)])
    return np.clip(corners, 0, np.array(truth.shape[::-1]) - 1.0)
