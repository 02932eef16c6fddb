"""From pixels to places: a click repairs a region, so what counts is how much uncertainty lies around it."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.head.features import box_mean

#: Radius of the disc over which a map is averaged, as a fraction of the frame's longer side. Larger ones lost in
#: development (docs/results/proposals.md): they pull clicks to where much is vaguely doubtful.
RADIUS = 0.012


def regional(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of `values` (h, w) in a small disc around each pixel; (h, w).

    Thin lines, as every mask has along its border, average out; blobs as large as a missing or superfluous part stay.
    The disc is Gaussian-like (two box means); pixels that are not `valid` count as zero.
    """
    radius = max(1, round(RADIUS * max(values.shape) * 0.75))
    source = torch.where(valid, values, torch.zeros_like(values))
    return box_mean(box_mean(source, radius), radius)
