"""From masks to outlines, for polygons, and from rough masks to prompts."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from worker.contract import Box, Click, Prompts

#: Largest distance of an outline from the mask's border, as a share of the outline's length, and in pixels at least.
TOLERANCE = 0.002
MIN_TOLERANCE_PX = 0.7

Ring = list[tuple[float, float]]


def rings(mask: NDArray[np.bool_]) -> list[Ring]:
    """Outer outlines of the parts of a mask, bool (height, width), largest first; (x, y) in percent of the image.

    Holes are not kept: a polygon of Label Studio has none. Parts too small for three points are left out.
    """
    height, width = mask.shape
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outlines = []
    for contour in sorted(found, key=cv2.contourArea, reverse=True):
        tolerance = max(MIN_TOLERANCE_PX, TOLERANCE * cv2.arcLength(contour, True))
        points = cv2.approxPolyDP(contour, tolerance, True)[:, 0]
        if len(points) >= 3:
            # A contour runs through pixel centres.
            outlines.append([(100 * (float(x) + 0.5) / width, 100 * (float(y) + 0.5) / height) for x, y in points])
    return outlines


def prompts_of(mask: NDArray[np.bool_]) -> Prompts | None:
    """Prompts for the object of a rough mask: its box, and a click as deep inside its largest part as possible.

    None for an empty mask. (x, y) in pixels of the mask.
    """
    _count, labels, stats, _centroids = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if len(stats) < 2:
        return None
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = Box(x0=float(cols[0]), y0=float(rows[0]), x1=float(cols[-1] + 1), y1=float(rows[-1] + 1))
    part = labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    # The image's border ends an object, too.
    depth = cv2.distanceTransform(np.pad(part, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, col = np.unravel_index(int(depth.argmax()), depth.shape)
    return Prompts(clicks=(Click(x=float(col) + 0.5, y=float(row) + 0.5),), box=box)
