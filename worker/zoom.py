"""The model looks at the object from near: "zoom-in".

The whole image, shrunk to the encoder's input, shows a small object in few cells. Once a first mask says where the
object is, the part of the image around it is encoded by itself, and this click and later ones are decoded there, much
as in Sofiiuk et al., "Reviving Iterative Training with Mask Guidance for Interactive Segmentation", 2021. The part
follows the mask: it is a function of the round before and the positive clicks, so an answer still depends on image and
prompts alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from worker.backbones import Backbone
from worker.byte_lru import ByteLRU
from worker.contract import Prompts
from worker.encode import Embedding, encode_window
from worker.frame import Frame, Window
from worker.masks import clean

#: What is added around the object on both sides together, in parts of its longer side; and how much of that must be
#: left for a part to stay as it is: half the encodes, as parts would otherwise move by a few pixels with most clicks.
MARGIN, LEAST_MARGIN = 0.8, 0.4
#: Nothing is gained where the part is hardly smaller than the image: this many times at least.
LEAST_ZOOM = 1.3
#: Shortest side of a part, pixels, unless the image is smaller.
LEAST_SIDE = 64
#: Nor does it stay where the one that is called for has a longer side of at most this share of its own; the whole image
#: is left sooner than a part. With 0.6 for both, every second click on one of many small objects called for an encode,
#: as their first masks are far too large; with 0.5 for both, masks were a little worse.
KEEP, KEEP_WHOLE = 0.5, 0.6
#: Longest side of what parts are cut from, pixels.
MOST_SIDE = 4096
#: The logit of what an earlier part did not show.
UNSEEN = -10.0
#: Bytes of encoded parts that are kept for one image outside a worker.
KEPT = 32 << 20

#: Encodes a part of an image; None where that cannot be had, and the whole is looked at instead.
Look = Callable[[Window], Embedding | None]


class Round(Protocol):
    """What the next round needs of one: its logits (h, w), and how they lie on the image."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def frame(self) -> Frame: ...


def follow(before: Round, prompts: Prompts) -> Window | None:
    """The part of the image to look at for `prompts`, after the round before, which may be all of it; None where
    nothing says where the object is."""
    around = _around(before, prompts)
    if around is None:
        return None
    size, current = before.frame.original_size, before.frame.window
    wanted = _wider(around, MARGIN, size)
    if max(size) < LEAST_ZOOM * max(wanted.size):
        wanted = Window(0, 0, size[1], size[0])
    keep = KEEP_WHOLE if before.frame.seen.size == size else KEEP
    if current is None or max(wanted.size) <= keep * max(current.size):
        return wanted
    return current if current.covers(_wider(around, LEAST_MARGIN, size)) else wanted


def _around(before: Round, prompts: Prompts) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) of the mask, without its specks, the positive clicks and the box, in original pixels."""
    positive = [click for click in prompts.clicks if click.positive]
    if not positive and prompts.box is None:
        return None
    xs, ys = [click.x for click in positive], [click.y for click in positive]
    if prompts.box is not None:
        xs += [prompts.box.x0, prompts.box.x1]
        ys += [prompts.box.y0, prompts.box.y1]
    frame = before.frame
    rows, cols = frame.valid
    inside = (clean(before.logits, frame, prompts)[:rows, :cols] > 0).cpu().numpy()
    rows_inside, cols_inside = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if rows_inside.size:
        for col, row in ((cols_inside[0], rows_inside[0]), (cols_inside[-1] + 1, rows_inside[-1] + 1)):
            x, y = frame.to_original(float(col), float(row))
            xs.append(x)
            ys.append(y)
    return min(xs), min(ys), max(xs), max(ys)


def _wider(around: tuple[float, float, float, float], margin: float, size: tuple[int, int]) -> Window:
    """The part about (x0, y0, x1, y1) with a margin, as far as an image of `size` (height, width) goes."""
    x0, y0, x1, y1 = around
    more = margin * max(x1 - x0, y1 - y0)
    (left, right), (top, bottom) = (
        _longer(low, high, max(more, LEAST_SIDE - (high - low)), length)
        for low, high, length in ((x0, x1, size[1]), (y0, y1, size[0]))
    )
    return Window(left, top, right, bottom)


def _longer(low: float, high: float, more: float, length: int) -> tuple[int, int]:
    start = min(max(round(low - more / 2), 0), length - 1)
    return start, max(min(round(high + more / 2), length), start + 1)


@torch.no_grad()
def carried_over(before: Round, frame: Frame) -> Tensor:
    """The logits of a round as mask input (1, h, w) in another frame of the same image."""
    if before.frame == frame:
        return before.logits[None]
    logits, (rows, cols) = before.logits, frame.lowres_size
    old_rows, old_cols = logits.shape
    x, y = (_places(n, frame, before.frame, axis) for axis, n in enumerate((cols, rows)))
    grid = torch.stack(torch.meshgrid(2 * x / old_cols - 1, 2 * y / old_rows - 1, indexing="xy"), -1)
    moved = F.grid_sample(logits[None, None], grid[None].to(logits), padding_mode="border", align_corners=False)[0]
    last_row, last_col = before.frame.valid
    unseen = ((y < 0) | (y > last_row))[:, None] | ((x < 0) | (x > last_col))[None]
    return moved.masked_fill(unseen.to(logits.device), UNSEEN)


def _places(count: int, frame: Frame, old: Frame, axis: int) -> Tensor:
    """Where the centres of `count` columns (axis 0) or rows (axis 1) of one frame lie in another one."""
    (from_zero, from_one), (to_zero, to_one) = (
        (at_zero[axis], at_one[axis])
        for at_zero, at_one in (
            (frame.to_original(0.0, 0.0), frame.to_original(1.0, 1.0)),
            (old.to_lowres(0.0, 0.0), old.to_lowres(1.0, 1.0)),
        )
    )
    original = from_zero + (from_one - from_zero) * (torch.arange(count, dtype=torch.float64) + 0.5)
    return to_zero + (to_one - to_zero) * original


def shrunk(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What parts of an image (H, W, 3) are cut from: the image, or where it is huge a smaller copy that can be kept."""
    height, width = image.shape[:2]
    shrink = MOST_SIDE / max(height, width)
    if shrink >= 1:
        return image
    size = max(round(width * shrink), 1), max(round(height * shrink), 1)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def looker(backbone: Backbone, image: NDArray[np.uint8]) -> Look:
    """Encodes parts of an image (H, W, 3), uint8 RGB, that is at hand; the latest are kept."""
    original_size, pixels = (image.shape[0], image.shape[1]), shrunk(image)
    kept: ByteLRU[Window, Embedding] = ByteLRU(KEPT)

    def look(window: Window) -> Embedding:
        known = kept.get(window)
        if known is None:
            known = encode_window(backbone, pixels, window, original_size)
            kept.put(window, known, known.size)
        return known

    return look
