"""From pixels to places: a click repairs a region, so what counts is how much uncertainty lies around it."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.head.features import box_mean

#: Radii of the discs over which a map is averaged, as fractions of the frame's longer side.
RADII = (0.012, 0.025)
#: A disc of radius r counts r^POWER: 0 takes the sharpest peak, 2 the largest total. Larger radii and powers lost in
#: development (docs/results/proposals.md): they pull clicks to where much is vaguely doubtful.
POWER = 0.0


def regional(values: Tensor, valid: Tensor, *, radii: tuple[float, ...] = RADII, power: float = POWER) -> Tensor:
    """max over radii of r^power times the mean of `values` (h, w) in the window around each pixel; (h, w).

    Thin lines, as every mask has along its border, average out; blobs as large as a missing or superfluous part stay.
    Windows are Gaussian-like (two box means); pixels that are not `valid` count as zero.
    """
    side = max(values.shape)
    source = torch.where(valid, values, torch.zeros_like(values))
    best = torch.zeros_like(values)
    for fraction in radii:
        radius = max(1, round(fraction * side * 0.75))
        blurred = box_mean(box_mean(source, radius), radius)
        best = torch.maximum(best, (fraction / radii[0]) ** power * blurred)
    return best
