"""Per-pixel features in which Segment Anything itself is one linear head.

SAM's mask logit is an inner product, l(x) = <h, U(x)>, of the mask token's hypernetwork output h and the up-scaled
decoder embedding U. Keeping the products h_c U_c(x) apart, beside l and what the clicks say, gives features phi(x) for
which w0 = (1 on `logit`, 0 elsewhere) reproduces SAM exactly. A posterior over w around w0 is then a posterior over
re-weighted SAM heads, and each logit f(x) = <w, phi(x)> is Gaussian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from worker.contract import Prompts
    from worker.decode import Decoded

#: Reach of a click in `near_*` features, in units of the longer side of the frame: a small part, a large part.
NEAR_RADII = (0.03, 0.12)
#: Logits are clipped to this before they are blurred, so that one far-off pixel does not rule its surroundings.
LOGIT_CLIP = 8.0
#: Sides of the blur windows as fractions of the longer side of the frame.
BLUR_SIDES = (0.03, 0.1)
CANDIDATES = 3
#: Proposals are made on a grid of at most this many cells along the longer side: 8 pixels of a 1024 frame each.
GRID = 128


def feature_names(channels: int) -> tuple[str, ...]:
    """Names of the features for a decoder with `channels` up-scaled channels (16 for tiny, 32 for published SAMs)."""
    return (
        "logit",
        *(f"channel_{index}" for index in range(channels)),
        "squashed",
        *(f"blur_{index}" for index in range(len(BLUR_SIDES))),
        *(f"candidate_{index}" for index in range(CANDIDATES)),
        *(f"near_positive_{index}" for index in range(len(NEAR_RADII))),
        *(f"near_negative_{index}" for index in range(len(NEAR_RADII))),
        "bias",
    )


def coarse(decoded: Decoded) -> Decoded:
    """`decoded` averaged over blocks so that its longer side has at most `GRID` cells, where sizes divide evenly.

    Averaging commutes with a linear head, keeps a click's place to half a block, and makes a proposal four times
    cheaper. Frames and coordinates stay right: only `lowres_size` changes.
    """
    height, width = decoded.logits.shape
    block = -(-max(height, width) // GRID)
    if block == 1 or height % block or width % block:
        return decoded
    maps = (decoded.logits[None], decoded.upscaled, decoded.candidates, decoded.colours)
    logits, upscaled, candidates, colours = (_block_mean(values, block).contiguous() for values in maps)
    frame = replace(decoded.frame, lowres_size=(height // block, width // block))
    return replace(decoded, logits=logits[0], upscaled=upscaled, candidates=candidates, colours=colours, frame=frame)


def _block_mean(values: Tensor, block: int) -> Tensor:
    """Mean over blocks of (n, h, w): (n, h / block, w / block). By sums of slices, which are quick whatever the memory
    layout is; pooling is not."""
    for axis in (1, 2):
        first, *others = torch.unflatten(values, axis, (-1, block)).unbind(axis + 1)
        for other in others:
            first = first + other
        values = first
    return values / block**2


def pixel_features(decoded: Decoded, prompts: Prompts) -> Tensor:
    """Features of every pixel of `decoded`: (d, h, w) float32 in the order of `feature_names`.

    `logit`: SAM's own mask logit; `channel_c`: h_c U_c, which sum to it; `squashed`: tanh(l / 2), the shape of a
    confident edge; `blur_i`: mean of the clipped logit around the pixel; `candidate_k`: how much the k-th multimask
    candidate (small to large) differs from the mask; `near_*`: exp(-d / r) to the nearest such click, 0 without one.
    """
    groups = _groups(decoded, prompts)
    return torch.cat([group if scale is None else scale[:, None, None] * group for group, scale in groups]).float()


def weighted_features(decoded: Decoded, prompts: Prompts, weights: Tensor) -> Tensor:
    """(h, w): the features of `pixel_features` times `weights` (d,), summed, without ever holding all of them: less
    time where only this sum is asked for."""
    total, start = torch.zeros_like(decoded.logits), 0
    for group, scale in _groups(decoded, prompts):
        own = weights[start : start + len(group)]
        own = own if scale is None else own * scale
        total += group[0] * own if len(group) == 1 else torch.tensordot(own, group, 1)
        start += len(group)
    return total


def _groups(decoded: Decoded, prompts: Prompts) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The features, (n, h, w) at a time, and what they are still to be multiplied by, (n,), if anything."""
    logits = decoded.logits
    height, width = logits.shape
    side = float(max(height, width))
    clipped = logits.clamp(-LOGIT_CLIP, LOGIT_CLIP)
    yield logits[None], None
    yield decoded.upscaled, decoded.hyper
    yield torch.tanh(logits / 2.0)[None], None
    for fraction in BLUR_SIDES:
        yield box_mean(clipped, max(1, round(fraction * side) // 2))[None], None
    yield _candidate_differences(decoded.candidates, clipped), None
    for positive in (True, False):
        points = [decoded.frame.to_lowres(c.x, c.y) for c in prompts.clicks if c.positive == positive]
        if not points:
            yield logits.new_zeros(len(NEAR_RADII), height, width), None
            continue
        distance = distance_to_points(points, height, width, device=logits.device) / side
        for radius in NEAR_RADII:
            yield torch.exp(-distance / radius)[None], None
    yield torch.ones_like(logits)[None], None


def distance_to_points(points: list[tuple[float, float]], height: int, width: int, *, device: torch.device) -> Tensor:
    """Distance in pixels from each pixel centre to the nearest (col, row) point: (height, width); inf if none."""
    if not points:
        return torch.full((height, width), torch.inf, device=device)
    cols = torch.arange(width, device=device) + 0.5
    rows = torch.arange(height, device=device) + 0.5
    where = torch.tensor(points, dtype=torch.float32, device=device)
    squared = (cols[None, None, :] - where[:, 0, None, None]) ** 2 + (
        rows[None, :, None] - where[:, 1, None, None]
    ) ** 2
    return squared.amin(0).sqrt()


def box_mean(image: Tensor, radius: int) -> Tensor:
    """Mean over windows of side 2 radius + 1 of (h, w), the border replicated; cost does not depend on the radius."""
    window = 2 * radius + 1
    for axis in (1, 0):
        pad = (radius + 1, radius, 0, 0) if axis == 1 else (0, 0, radius + 1, radius)
        sums = F.pad(image[None, None], pad, mode="replicate")[0, 0].cumsum(axis)
        length = image.shape[axis]
        image = (sums.narrow(axis, window, length) - sums.narrow(axis, 0, length)) / window
    return image


def smoothed(logits: Tensor, valid: tuple[int, int]) -> Tensor:
    """Logits (h, w), clipped, each with its neighbours: twice the mean over 3 x 3 cells. What lies beyond the `valid`
    (rows, columns), padding, has no part in it and repeats the border.

    A head weighs the decoder's channels anew, and these change from cell to cell: the border of its mask would be
    ragged.
    """
    (height, width), (rows, cols) = logits.shape, valid
    inside = box_mean(box_mean(logits[:rows, :cols].clamp(-LOGIT_CLIP, LOGIT_CLIP), 1), 1)
    return F.pad(inside[None, None], (0, width - cols, 0, height - rows), mode="replicate")[0, 0]


def _candidate_differences(candidates: Tensor, clipped: Tensor) -> Tensor:
    """(CANDIDATES, h, w): clipped candidate minus clipped mask, smallest first; zeros where there are fewer."""
    clipped_candidates = candidates.clamp(-LOGIT_CLIP, LOGIT_CLIP)
    order = (candidates > 0).flatten(1).sum(1).argsort(stable=True)
    chosen = clipped_candidates[order][:CANDIDATES] - clipped
    return F.pad(chosen, (0, 0, 0, 0, 0, CANDIDATES - chosen.shape[0]))
