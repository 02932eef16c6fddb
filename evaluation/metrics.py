"""Measures of interactive segmentation, per object and per data set."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from worker.contract import Click

#: An object is thin when the largest disc in it covers less than this share of it.
THIN = 0.25

Mask = NDArray[np.bool_]
Curve = NDArray[np.float64]


def iou(mask: Mask, truth: Mask, ignore: Mask | None = None) -> float:
    """Intersection over union outside `ignore`; 1 when both are empty there (nothing to find, nothing found)."""
    either, both = mask | truth, mask & truth
    if ignore is not None:
        either, both = either & ~ignore, both & ~ignore
    union = np.count_nonzero(either)
    return 1.0 if union == 0 else np.count_nonzero(both) / union


def honoured(mask: Mask, clicks: Sequence[Click]) -> float:
    """Share of the clicks whose pixel has their label in the mask (H, W), clicks in its pixels; 1 without clicks."""
    height, width = mask.shape
    kept = [mask[min(int(c.y), height - 1), min(int(c.x), width - 1)] == c.positive for c in clicks]
    return sum(map(bool, kept)) / len(kept) if kept else 1.0


def disc_share(mask: Mask) -> float:
    """Area of the largest disc inside `mask` (H, W) over its own area: about 1 for a disc, 0.79 for a square, 0.2 for a
    bar of 1 : 4. Where a mask ends at the image's border, so do discs in it. Raises ValueError for an empty mask."""
    area = np.count_nonzero(mask)
    if not area:
        raise ValueError("An empty mask has no shape.")
    depth = float(cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).max())
    return float(np.pi * depth**2 / area)


def auc(curve: Curve) -> float:
    """Area under IoU over clicks 1..n by the trapezoidal rule, divided by n - 1; a curve of one click is its value."""
    if len(curve) == 1:
        return float(curve[0])
    return float(np.sum((curve[1:] + curve[:-1]) / 2) / (len(curve) - 1))


def clicks_to(curve: Curve, target: float) -> tuple[int, bool]:
    """(clicks, failed): the first click at which IoU >= target, or (len(curve), True) when none does.

    Reaching the target at the very last click is a success (NoC as in RITM, with the cap at the curve's length).
    """
    reached = np.flatnonzero(curve >= target)
    return (int(reached[0]) + 1, False) if reached.size else (len(curve), True)


def best_so_far(curve: Curve) -> Curve:
    """Running maximum."""
    return np.maximum.accumulate(curve)


def object_measures(curve: Curve) -> dict[str, float]:
    """Every measure of one object under one strategy and seed; keys as in summary.json."""
    noc85, failed85 = clicks_to(curve, 0.85)
    noc90, failed90 = clicks_to(curve, 0.90)
    return {
        "iou_1": float(curve[0]),
        "iou_final": float(curve[-1]),
        "best_iou": float(curve.max()),
        "delta_iou": float(curve[-1] - curve[0]),
        "auc": auc(curve),
        "noc85": float(noc85),
        "noc90": float(noc90),
        "failures85": float(failed85),
        "failures90": float(failed90),
    }


def bootstrap(
    values: NDArray[np.float64], groups: Sequence[Hashable], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n,), resampling whole groups (images) with replacement."""
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    member = np.array([index[group] for group in groups])
    sums = np.bincount(member, weights=values)
    counts = np.bincount(member).astype(float)
    chosen = np.random.default_rng(seed).integers(len(index), size=(draws, len(index)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """Rank of each name, 1 = largest score, ties share their mean rank."""
    names = list(scores)
    return dict(zip(names, (float(r) for r in rankdata([-scores[name] for name in names])), strict=True))
