"""Low-resolution logits to the mask that the annotator gets: cleaned, at full size, true to every click."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from worker.contract import Click, Prompts
from worker.frame import Frame

Mask = npt.NDArray[np.bool_]

#: Specks and holes below this many low-resolution cells, or this share of the mask, are not the annotator's intention.
SPECK_CELLS = 8
SPECK_SHARE = 0.001
#: Radius of the repair around a click that the mask contradicts, in low-resolution cells.
REPAIR_CELLS = 1.5
#: Rows of the output that are computed at a time: a few low-resolution rows of a large image.
BAND = 128
#: A band whose columns change more often than this between inside, outside and unclear is computed in one piece.
MANY_EDGES = 32


def to_mask(logits: Tensor, frame: Frame, prompts: Prompts, size: tuple[int, int] | None = None) -> Mask:
    """The mask for low-resolution logits (h, w): bool of `size` (height, width), by default the original image's; with
    nothing outside the frame's window.

    `prompts` are in original pixels. Every positive click's pixel is in the mask, every negative click's is not; of
    two opposite clicks on one pixel the later one counts.
    """
    size = size or frame.original_size
    cleaned = clean(logits, frame, prompts)
    if frame.seen.size == frame.original_size:
        mask = upsample(cleaned, frame, size)
    else:
        window = frame.seen.scaled(frame.original_size, size)
        mask = np.zeros(size, np.bool_)
        mask[window.slices] = upsample(cleaned, frame, window.size)
    _honour_clicks(mask, frame, prompts)
    return mask


def clean(logits: Tensor, frame: Frame, prompts: Prompts) -> Tensor:
    """Logits (h, w) without specks that hold no positive click and without tiny holes that hold no negative one.

    The largest part of the mask always stays. Returns a copy where something changed, else `logits` itself.
    """
    rows, cols = frame.valid
    values = logits[:rows, :cols].detach().cpu().numpy()
    inside = values > 0
    limit = max(SPECK_CELLS, SPECK_SHARE * int(inside.sum()))
    specks = _small_parts(inside, 8, limit, _cells(prompts, frame, positive=True)) if inside.any() else None
    holes = _small_parts(~inside, 4, limit, _cells(prompts, frame, positive=False)) if not inside.all() else None
    if (specks is None or not specks.any()) and (holes is None or not holes.any()):
        return logits
    strength = np.maximum(np.abs(values), 1e-3)
    if specks is not None:
        values = np.where(specks, -strength, values)
    if holes is not None:
        values = np.where(holes, strength, values)
    cleaned = logits.clone()
    cleaned[:rows, :cols] = torch.from_numpy(values).to(logits.device)
    return cleaned


def upsample(logits: Tensor, frame: Frame, size: tuple[int, int]) -> Mask:
    """Threshold the logits (h, w) of a frame's window: bool of `size` (height, width), as `Sam.postprocess_masks` > 0.

    Bilinear interpolation is separable, so columns are interpolated first, and rows are sums of a few of the results:
    a small matrix product for each band of rows. An interpolated value has the sign of the values it lies between
    where these agree, so on a CPU only the columns of a band in which both signs occur are computed. By PyTorch:
    NumPy's threads would go on spinning after each product, and take a core from the encoder.
    """
    wide = _resize_last_axis(logits, frame.padded_size[1], frame.input_size[1], size[1])
    shape = (frame.lowres_size[0], frame.padded_size[0], frame.input_size[0], size[0])
    if logits.device.type != "cpu":
        return _to_host(_row_weights(*shape, logits.device) @ wide > 0)
    positive = (wide > 0).numpy()
    mask = np.zeros(size, np.bool_)
    for top, bottom, low, weights in _row_bands(*shape):
        high = low + weights.shape[1]
        count = positive[low:high].sum(axis=0, dtype=np.uint16)
        # 0: outside, 1: to be computed, 2: inside.
        kind = (count > 0).view(np.uint8) + (count == high - low).view(np.uint8)
        edges = np.flatnonzero(kind[1:] != kind[:-1]) + 1
        if edges.size > MANY_EDGES and (unclear := np.flatnonzero(kind == 1)).size:
            kind[unclear[0] : unclear[-1] + 1] = 1
            edges = np.flatnonzero(kind[1:] != kind[:-1]) + 1
        for left, right in pairwise([0, *edges.tolist(), kind.size]):
            if kind[left] == 2:
                mask[top:bottom, left:right] = True
            elif kind[left] == 1:
                product = torch.mm(weights, wide[low:high, left:right]).numpy()
                np.greater(product, 0, out=mask[top:bottom, left:right])
    return mask


def _resize_last_axis(values: Tensor, padded_length: int, input_length: int, length: int) -> Tensor:
    """One axis of `Sam.postprocess_masks`: to the padded input, cropped, to the output size; (n, w) to (n, W)."""
    padded = F.interpolate(values[None], padded_length, mode="linear", align_corners=False)
    return F.interpolate(padded[..., :input_length], length, mode="linear", align_corners=False)[0]


@lru_cache(maxsize=16)
def _row_weights(lowres: int, padded_length: int, input_length: int, length: int, device: torch.device) -> Tensor:
    """(length, lowres): what each low-resolution row contributes to each output row."""
    with torch.inference_mode(False), torch.no_grad():
        return _resize_last_axis(torch.eye(lowres), padded_length, input_length, length).T.contiguous().to(device)


@lru_cache(maxsize=16)
def _row_bands(lowres: int, padded_length: int, input_length: int, length: int) -> list[tuple[int, int, int, Tensor]]:
    """For each band of output rows: first row, last row + 1, first low-resolution row, weights (rows, low-res rows)."""
    weights = _row_weights(lowres, padded_length, input_length, length, torch.device("cpu"))
    bands = []
    for top, bottom in pairwise([*range(0, length, BAND), length]):
        used = np.flatnonzero(weights[top:bottom].any(dim=0))
        low, high = int(used[0]), int(used[-1]) + 1
        bands.append((top, bottom, low, weights[top:bottom, low:high].contiguous()))
    return bands


def _to_host(mask: Tensor) -> Mask:
    """A mask from the device, through pinned memory where that is quicker."""
    if mask.device.type != "cuda":
        return mask.cpu().numpy()
    host = torch.empty(mask.shape, dtype=torch.bool, pin_memory=True)
    host.copy_(mask)
    return host.numpy()


def _small_parts(region: Mask, connectivity: int, limit: float, keep: list[tuple[int, int]]) -> Mask:
    """Cells of connected parts below `limit` cells, but for the largest part and those with a cell of `keep`."""
    _count, labels, stats, _centroids = cv2.connectedComponentsWithStats(
        region.astype(np.uint8), connectivity=connectivity
    )
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # everything that is not region
    small = areas < limit
    small[[0, int(areas.argmax())]] = False
    for row, col in keep:
        small[labels[row, col]] = False
    return np.asarray(small[labels])


def _cells(prompts: Prompts, frame: Frame, *, positive: bool) -> list[tuple[int, int]]:
    """(row, col) of the low-resolution cells that hold the positive or the negative clicks."""
    rows, cols = frame.valid
    cells = []
    for click in frame.visible(prompts).clicks:
        if click.positive == positive:
            col, row = frame.to_lowres(click.x, click.y)
            cells.append((min(max(int(row), 0), rows - 1), min(max(int(col), 0), cols - 1)))
    return cells


def _honour_clicks(mask: Mask, frame: Frame, prompts: Prompts) -> None:
    """Draw a small disc around each click that the mask contradicts, never as far as a click of the other kind."""
    height, width = mask.shape
    to_x, to_y = width / frame.original_size[1], height / frame.original_size[0]
    seen_height, seen_width = frame.seen.size
    radius = REPAIR_CELLS * min(to_x * seen_width / frame.valid[1], to_y * seen_height / frame.valid[0])
    clicks = [Click(x=click.x * to_x, y=click.y * to_y, positive=click.positive) for click in prompts.clicks]
    for click in clicks:
        x, y = min(max(int(click.x), 0), width - 1), min(max(int(click.y), 0), height - 1)
        if mask[y, x] == click.positive:
            continue
        others = [math.dist((c.x, c.y), (click.x, click.y)) for c in clicks if c.positive != click.positive]
        reach = min([radius, *(distance / 2 - 1 for distance in others)])
        if reach > 0:
            top, left = max(0, math.floor(y - reach)), max(0, math.floor(x - reach))
            part = mask[top : math.ceil(y + reach) + 1, left : math.ceil(x + reach) + 1]
            rows, cols = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
            part[(rows - y) ** 2 + (cols - x) ** 2 <= reach**2] = click.positive
        mask[y, x] = click.positive
