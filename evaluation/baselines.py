"""What strategies are compared with: clicks placed all at once from the truth, and segmenters that learn nothing.

One-shot baselines choose k clicks from the ground truth without ever seeing a mask, so they have more knowledge than a
proposal and less feedback. `grabcut` and `random-walker` get the oracle's clicks, one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluation.clicker import Mask, first_click
from worker.contract import Click

#: Half of the clicks of a one-shot baseline, rounded up, are positive; the first is the object's centre, as everywhere.
Placement = Callable[[Mask, int, np.random.Generator], list[tuple[int, int]]]


def random_places(region: Mask, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` (row, col) drawn uniformly from `region`."""
    index = rng.choice(np.flatnonzero(region), count, replace=int(region.sum()) < count)
    return [(int(i // region.shape[1]), int(i % region.shape[1])) for i in index]


def kmedoids_places(region: Mask, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Medoids of `count` clusters of the region's pixels (k-means on at most 2000 of them, then the nearest pixel)."""
    points = _sample(region, 2000, rng)
    count_ = min(count, len(points))
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.5)
    cv2.setRNGSeed(int(rng.integers(2**31 - 1)))
    _, _, centres = cv2.kmeans(points.astype(np.float32), count_, None, criteria, 2, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
    nearest = [points[((points - centre) ** 2).sum(1).argmin()] for centre in centres]
    return [(int(row), int(col)) for row, col in nearest]


def max_distance_places(region: Mask, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Farthest-point sampling: each place as far as can be from those before; the first is drawn."""
    points = _sample(region, 2000, rng)
    chosen = [int(rng.integers(len(points)))]
    distance = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
    return [(int(points[i][0]), int(points[i][1])) for i in chosen]


def entropy_places(entropy: NDArray[np.float32]) -> Placement:
    """Places of largest entropy of the mask after the first click (map at the image's size), kept 1/64 side apart."""

    def places(region: Mask, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        del rng
        scores = np.where(region, entropy, -np.inf)
        radius = max(region.shape) / 64
        rows, cols = np.ogrid[: region.shape[0], : region.shape[1]]
        found: list[tuple[int, int]] = []
        while len(found) < count and np.isfinite(scores.max()):
            row, col = np.unravel_index(int(scores.argmax()), scores.shape)
            found.append((int(row), int(col)))
            scores[(rows - row) ** 2 + (cols - col) ** 2 <= radius**2] = -np.inf
        return found

    return places


ONE_SHOT: dict[str, Placement] = {
    "one-shot-random": random_places,
    "one-shot-kmedoids": kmedoids_places,
    "one-shot-max-distance": max_distance_places,
}


def one_shot_clicks(truth: Mask, count: int, place: Placement, rng: np.random.Generator) -> tuple[Click, ...]:
    """`count` clicks at once: the centre, then positives and negatives in turn, placed by `place` in their regions."""
    start = first_click(truth)
    positives = place(truth, count // 2, rng) if count > 2 else []
    negatives = place(~truth, count // 2, rng) if not truth.all() and count > 1 else []
    clicks = [start]
    for index in range(count):
        for places, positive in ((negatives, False), (positives, True)):
            if index < len(places) and len(clicks) < count:
                row, col = places[index]
                clicks.append(Click(x=col + 0.5, y=row + 0.5, positive=positive))
    return tuple(clicks)


def grabcut(
    image: NDArray[np.uint8], clicks: tuple[Click, ...], *, radius: int = 4, rounds: int = 4, side: int = 256
) -> Mask:
    """OpenCV's GrabCut from clicks: discs around clicks are certain, the rest is likely background but near positives.

    image: H x W x 3 RGB uint8, worked on with at most `side` pixels; returns H x W bool.
    """
    small, scale = _shrunk(image, side)
    labels = np.full(small.shape[:2], cv2.GC_PR_BGD, np.uint8)
    reach = max(labels.shape) // 8
    for positive, likely, certain in ((True, cv2.GC_PR_FGD, cv2.GC_FGD), (False, None, cv2.GC_BGD)):
        for click in (c for c in clicks if c.positive == positive):
            if likely is not None:
                cv2.circle(labels, (int(click.x * scale), int(click.y * scale)), reach, likely, -1)
        for click in (c for c in clicks if c.positive == positive):
            cv2.circle(labels, (int(click.x * scale), int(click.y * scale)), radius, certain, -1)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(small, labels, None, *models, rounds, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
    return _enlarged((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), image)


def random_walker(image: NDArray[np.uint8], clicks: tuple[Click, ...], *, radius: int = 3, side: int = 256) -> Mask:
    """scikit-image's random walker from clicks, on an image of at most `side` pixels; the frame is background.

    image: H x W x 3 RGB uint8; returns H x W bool.
    """
    from skimage.segmentation import random_walker as walk

    small, scale = _shrunk(image, side)
    labels = np.zeros(small.shape[:2], np.uint8)
    labels[0], labels[-1], labels[:, 0], labels[:, -1] = 2, 2, 2, 2
    for click in clicks:
        cv2.circle(labels, (int(click.x * scale), int(click.y * scale)), radius, 1 if click.positive else 2, -1)
    found = walk(small / 255.0, labels, beta=300, mode="bf", channel_axis=-1)
    return _enlarged(found == 1, image)


def _shrunk(image: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], float]:
    """The image with at most `side` pixels along its longer side, and by what it was scaled."""
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    small = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    return small.astype(np.uint8), scale


def _enlarged(mask: NDArray[np.bool_], image: NDArray[np.uint8]) -> Mask:
    """A mask of the shrunk image at the image's own size."""
    height, width = image.shape[:2]
    return np.asarray(cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def _sample(region: Mask, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    points = np.argwhere(region)
    return points[rng.choice(len(points), min(count, len(points)), replace=False)].astype(float)
