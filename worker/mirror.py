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
    columns = whole - torch.arange(values.shape[-1], device=values.device)
    left = values[..., columns.clamp(min=0)]
    share = last - whole
    if not share:
        return left
    return left.lerp(values[..., (columns + 1).clamp(0, values.shape[-1] - 1)], share)


def mirrored_points(points: Tensor, frame: Frame) -> Tensor:
    """Points (..., 2), (x, y) in pixels of the encoder's input."""
    return torch.stack([frame.input_size[1] - points[..., 0], points[..., 1]], -1)


def mirrored_boxes(boxes: Tensor, frame: Frame) -> Tensor:
    """Boxes (B, 4), x0, y0, x1, y1 in pixels of the encoder's input."""
    corners = mirrored_points(boxes.view(-1, 2, 2), frame)
    return torch.cat([corners.amin(1), corners.amax(1)], -1)
