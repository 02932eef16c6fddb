"""Simulated users. They know the ground truth; the product never does.

Points are (x, y) in pixels of the original image, at pixel centres (col + 0.5, row + 0.5), as in `worker.contract`.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from worker.acquisition.candidates import exclusion_radius
from worker.contract import Click

Mask = NDArray[np.bool_]

#: The human-like user misses errors under this part of the image and clicks off-centre by this part of their depth.
HUMAN_MISSES = 0.002
HUMAN_NOISE = 0.4


def depth(region: Mask) -> NDArray[np.float32]:
    """Distance of each pixel of `region` to its outside, the image's border counting as outside; 0 elsewhere."""
    found = np.zeros(region.shape, np.float32)
    box = bounding_box(region)
    padded = np.pad(region[box].astype(np.uint8), 1)
    found[box] = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    return found


def bounding_box(region: Mask) -> tuple[slice, slice]:
    """(rows, columns) of the smallest rectangle that holds every True pixel; empty slices when there is none."""
    left, top, width, height = cv2.boundingRect(region.view(np.uint8))
    return slice(top, top + height), slice(left, left + width)


def first_click(truth: Mask) -> Click:
    """The centre of the object: the deepest pixel, the first in row-major order of equals."""
    row, col = _argmax(depth(truth))
    return Click(x=col + 0.5, y=row + 0.5, positive=True)


def answer(truth: Mask, x: float, y: float) -> Click:
    """The exact user: the true label of the pixel that holds (x, y)."""
    row, col = min(int(y), truth.shape[0] - 1), min(int(x), truth.shape[1] - 1)
    return Click(x=x, y=y, positive=bool(truth[row, col]))


def open_places(shape: tuple[int, ...], clicks: tuple[Click, ...]) -> Mask:
    """Pixels of the original image outside the exclusion discs of earlier clicks, the same discs for every strategy."""
    radius = exclusion_radius(max(shape))
    reach = math.ceil(radius) + 1
    places = np.ones(shape, dtype=bool)
    for click in clicks:
        top, left = max(0, int(click.y) - reach), max(0, int(click.x) - reach)
        part = places[top : int(click.y) + reach + 1, left : int(click.x) + reach + 1]
        rows, cols = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
        part &= (cols + 0.5 - click.x) ** 2 + (rows + 0.5 - click.y) ** 2 > radius**2
    return places


def oracle_click(truth: Mask, mask: Mask, clicks: tuple[Click, ...], ignore: Mask | None = None) -> Click | None:
    """The centre of the largest error: the deepest wrong pixel outside the exclusion discs, or None when none is wrong.

    Equal depths of a missing and a superfluous part give a negative click (as RITM's clicker does).
    """
    missing, superfluous, places = _errors(truth, mask, clicks, ignore)
    deep_missing, deep_superfluous = depth(missing) * places, depth(superfluous) * places
    positive = bool(deep_missing.max() > deep_superfluous.max())
    deepest = deep_missing if positive else deep_superfluous
    if deepest.max() <= 0:
        return None
    row, col = _argmax(deepest)
    return Click(x=col + 0.5, y=row + 0.5, positive=positive)


def human_like_click(
    truth: Mask, mask: Mask, clicks: tuple[Click, ...], rng: np.random.Generator, ignore: Mask | None = None
) -> Click | None:
    """A person: sees one of the larger errors (drawn by area), misses small ones, and clicks somewhat off its centre.

    The click stays inside the error that was seen, so its label is right. When every error is too small to be seen, the
    largest is taken. None when nothing outside the exclusion discs is wrong.
    """
    missing, superfluous, places = _errors(truth, mask, clicks, ignore)
    box = bounding_box(missing | superfluous)
    labels, count = ndimage.label((missing & places)[box])
    others, other_count = ndimage.label((superfluous & places)[box])
    labels[others > 0] = others[others > 0] + count
    areas = np.bincount(labels.ravel(), minlength=count + other_count + 1)[1:].astype(float)
    if areas.size == 0:
        return None
    seen = np.where(areas >= HUMAN_MISSES * truth.size, areas, 0.0)
    if not seen.any():
        seen = np.where(areas == areas.max(), areas, 0.0)
    region = np.zeros(truth.shape, dtype=bool)
    region[box] = labels == 1 + rng.choice(areas.size, p=seen / seen.sum())
    inner = depth(region)
    row, col = _argmax(inner)
    spread = HUMAN_NOISE * float(inner[row, col])
    for _ in range(20):
        y, x = row + spread * rng.standard_normal(), col + spread * rng.standard_normal()
        r, c = round(y), round(x)
        if 0 <= r < truth.shape[0] and 0 <= c < truth.shape[1] and region[r, c]:
            row, col = r, c
            break
    return Click(x=col + 0.5, y=row + 0.5, positive=bool(truth[row, col]))


def _errors(truth: Mask, mask: Mask, clicks: tuple[Click, ...], ignore: Mask | None) -> tuple[Mask, Mask, Mask]:
    places = open_places(truth.shape, clicks)
    judged = np.ones(truth.shape, dtype=bool) if ignore is None else ~ignore
    return truth & ~mask & judged, mask & ~truth & judged, places


def _argmax(values: NDArray[np.float32]) -> tuple[int, int]:
    row, col = np.unravel_index(int(values.argmax()), values.shape)
    return int(row), int(col)
