"""Where a click may go, and picking the best places of a score map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.head.features import distance_to_points

if TYPE_CHECKING:
    from worker.contract import Prompts
    from worker.decode import Decoded

#: No click within this many pixels of an earlier one, in a frame whose longer side is 1024.
EXCLUSION = 16.0


def exclusion_radius(size: int) -> float:
    """The exclusion radius in pixels of a frame whose longer side has `size` pixels."""
    return EXCLUSION * size / 1024.0


def allowed_pixels(decoded: Decoded, prompts: Prompts) -> Tensor:
    """(h, w) bool: low-resolution pixels whose centre lies on the image and outside every exclusion disc."""
    height, width = decoded.logits.shape
    points = [decoded.frame.to_lowres(click.x, click.y) for click in prompts.clicks]
    distance = distance_to_points(points, height, width, device=decoded.logits.device)
    allowed = distance > exclusion_radius(max(height, width))
    rows, cols = decoded.frame.valid
    allowed[rows:, :] = False
    allowed[:, cols:] = False
    return allowed


def best_pixel(score: Tensor, allowed: Tensor) -> tuple[int, int] | None:
    """(row, col) of the largest finite score among allowed pixels; of equals, the first in row-major order; or None."""
    masked = torch.where(allowed & torch.isfinite(score), score, -torch.inf)
    index = int(masked.flatten().argmax())
    row, col = divmod(index, score.shape[1])
    return (row, col) if torch.isfinite(masked[row, col]) else None


def best_pixels(score: Tensor, allowed: Tensor, count: int, radius: float) -> list[tuple[int, int]]:
    """Up to `count` (row, col), best first, no two within `radius` pixels (greedy non-maximum suppression)."""
    allowed = allowed.clone()
    height, width = score.shape
    found: list[tuple[int, int]] = []
    while len(found) < count and (pixel := best_pixel(score, allowed)) is not None:
        found.append(pixel)
        row, col = pixel
        allowed &= distance_to_points([(col + 0.5, row + 0.5)], height, width, device=score.device) > radius
    return found
