"""A part of an image that is looked at twice, as it is and mirrored: both answers' mean is better than either.

Views lie along the first axis of an embedding's features, the mirrored one second. Only what holds the image is
mirrored, left to right; the padding stays where it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.frame import Frame


def mirrored_pixels(pixels: Tensor) -> Tensor:
    """An image (1, 3, h, w), not padded yet, and its mirror image: (2, 3, h, w)."""
    return torch.cat([pixels, pixels.flip(-1)])


def mirrored_map(values: Tensor, frame: Frame) -> Tensor:
    """Maps (..., h, w) of `frame`, mirrored; where the image ends within a column, between neighbouring columns."""
    last = frame.width - 1.0
    whole = math.floor(last)
    left = _from(whole, values)
    share = last - whole
    return left.lerp(_from(whole + 1, values), share) if share else left


def _from(last: int, values: Tensor) -> Tensor:
    """Maps (..., h, w) with column `last` first, the one before it second and so on; beyond either end its column."""
    width = values.shape[-1]
    before = values[..., -1:].expand(*values.shape[:-1], max(last + 1 - width, 0))
    after = values[..., :1].expand(*values.shape[:-1], max(width - last - 1, 0))
    parts = before, values[..., : last + 1].flip(-1), after
    return torch.cat([part for part in parts if part.shape[-1]], -1)[..., :width]


def mirrored_points(points: Tensor, frame: Frame) -> Tensor:
    """Points (..., 2), (x, y) in pixels of the encoder's input."""
    return torch.stack([frame.input_size[1] - points[..., 0], points[..., 1]], -1)


def mirrored_boxes(boxes: Tensor, frame: Frame) -> Tensor:
    """Boxes (B, 4), x0, y0, x1, y1 in pixels of the encoder's input."""
    corners = mirrored_points(boxes.view(-1, 2, 2), frame)
    return torch.cat([corners.amin(1), corners.amax(1)], -1)
