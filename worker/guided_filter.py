"""A mask's border that follows the image's.

The guided filter of He, Sun and Tang, "Guided Image Filtering", IEEE TPAMI 2013: within a small window the mask is
taken for a linear function of the colours, q = a . I + b, whose coefficients are those of ridge regression; each cell
averages the functions of the windows that it lies in. Where colours change at the mask's border, the border moves to
where they do; where they do not, it becomes smooth. Coefficients are found on a coarser grid, as in He and Sun, "Fast
Guided Filter", 2015 (arXiv 1505.00996): a quarter of the time, and masks are as good. What the paper has not: colours
that explain little of the mask in a window, as in speckle or between striped layers, are not followed there, as borders
would become ragged.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy
from torch.nn import functional as F

Map = NDArray[np.float32]

#: Cells of the map (256 on the longer side) to one of the grid on which coefficients are found.
STEP = 2
#: Cells of that grid from a window's centre to its side: how far the border may be off.
RADIUS = 3
#: The ridge: colours in [0, 1] that vary by less than its root, 1.4 of 255 levels, count as one.
EPSILON = 3e-5
#: Share of the mask's variance in a window that colours must explain to be followed at all, and to be followed fully.
LEAST_EXPLAINED, ENOUGH_EXPLAINED = 0.2, 0.4
#: A mask that varies by less than this in a window has no border there.
LEAST_VARIANCE = np.float32(1e-3)
#: Logits are clipped to this: where the border is says the sign, how sure the model is hardly helps.
CLIP = 1.0


def guided(logits: Tensor, colours: Tensor, valid: tuple[int, int]) -> Tensor:
    """Logits (h, w) float32, within about `CLIP`, whose sign changes where the colours (3, h, w), RGB in [0, 1], do.

    What lies beyond the `valid` (rows, columns), padding, has no part in it and repeats the border.
    """
    (height, width), (rows, cols) = logits.shape, valid
    mask: Map = logits[:rows, :cols].clamp(-CLIP, CLIP).cpu().numpy()
    guide: Map = colours[:, :rows, :cols].cpu().numpy()
    filtered = from_numpy(guided_filter(mask, guide, RADIUS, EPSILON, STEP)).to(logits.device)
    return F.pad(filtered[None, None], (0, width - cols, 0, height - rows), mode="replicate")[0, 0]


def guided_filter(mask: Map, guide: Map, radius: int, epsilon: float, step: int = 1) -> Map:
    """The guided filter of `mask` (h, w) by colours (3, h, w), both float32: equations 14 to 16 of the paper, on means
    over `step` x `step` cells, and slopes times `_trust`; `radius` is in these cells."""
    # Variances are differences of squares: of numbers about zero little is lost.
    colours = [colour - colour.mean() for colour in guide]
    slopes, offset = _coefficients(_shrunk(mask, step), [_shrunk(colour, step) for colour in colours], radius, epsilon)
    size = mask.shape[1], mask.shape[0]
    filtered = _grown(_box(offset, radius), size)
    for slope, colour in zip(slopes, colours, strict=True):
        filtered += _grown(_box(slope, radius), size) * colour
    return filtered


def _coefficients(mask: Map, colours: Sequence[Map], radius: int, epsilon: float) -> tuple[list[Map], Map]:
    """a of each colour and b, (h, w), of the window about each cell."""
    r, g, b = colours
    means, mean = [_box(colour, radius) for colour in colours], _box(mask, radius)

    def covariance(one: Map, other: Map, mean_of_one: Map, mean_of_other: Map) -> Map:
        found: Map = _box(one * other, radius) - mean_of_one * mean_of_other
        return found

    rr, gg, bb = (covariance(c, c, m, m) + np.float32(epsilon) for c, m in zip(colours, means, strict=True))
    rg, rb = (covariance(r, c, means[0], m) for c, m in zip(colours[1:], means[1:], strict=True))
    gb = covariance(g, b, means[1], means[2])
    shared = [covariance(c, mask, m, mean) for c, m in zip(colours, means, strict=True)]
    slopes = _solved((rr, rg, rb, gg, gb, bb), shared)
    trust = _trust(slopes, shared, covariance(mask, mask, mean, mean))
    slopes = [trust * slope for slope in slopes]
    return slopes, mean - sum(slope * m for slope, m in zip(slopes, means, strict=True))


def _trust(slopes: Sequence[Map], shared: Sequence[Map], variance: Map) -> Map:
    """0 to 1: how far colours are followed, by the share of the mask's variance that they explain (R squared)."""
    explained = sum(slope * part for slope, part in zip(slopes, shared, strict=True))
    share = explained / (np.maximum(variance, 0) + LEAST_VARIANCE)
    trust: Map = np.clip((share - LEAST_EXPLAINED) / (ENOUGH_EXPLAINED - LEAST_EXPLAINED), 0, 1)
    return trust


def _solved(matrix: Sequence[Map], right: Sequence[Map]) -> list[Map]:
    """x of A x = `right`, A positive definite and given as its upper triangle by rows; at each cell another matrix.

    By elimination (LDL): where an image is grey the matrix is nearly singular, and Cramer's rule would lose all digits.
    """
    rr, rg, rb, gg, gb, bb = matrix
    r, g, b = right
    g_of_r, b_of_r = rg / rr, rb / rr
    gg, gb = gg - g_of_r * rg, gb - g_of_r * rb
    b_of_g = gb / gg
    bb = bb - b_of_r * rb - b_of_g * gb
    g = g - g_of_r * r
    b = b - b_of_r * r - b_of_g * g
    third = b / bb
    second = g / gg - b_of_g * third
    return [r / rr - g_of_r * second - b_of_r * third, second, third]


def _box(values: Map, radius: int) -> Map:
    side = 2 * radius + 1
    return np.asarray(cv2.boxFilter(values, -1, (side, side), borderType=cv2.BORDER_REPLICATE))


def _shrunk(values: Map, step: int) -> Map:
    """Means over `step` x `step` cells, the last ones perhaps of fewer."""
    if step == 1:
        return values
    size = -(-values.shape[1] // step), -(-values.shape[0] // step)
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), np.float32)


def _grown(values: Map, size: tuple[int, int]) -> Map:
    """Of `size` (width, height), interpolated."""
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_LINEAR), np.float32)
