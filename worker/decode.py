"""Prompts and an embedding to low-resolution logits, with everything that the head and the proposal need beside them.

Coordinates. Original: (x, y) in pixels of the original image. Low-resolution: (col, row) in cells of the decoder's
output, which covers the padded square input. Both are continuous, the centre of the first pixel or cell at (0.5, 0.5),
so `int(col)` is the cell. Clicks go to the prompt encoder as `SamPredictor.predict` sends them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from worker.backbones import Backbone
from worker.byte_lru import ByteLRU
from worker.contract import Prompts
from worker.embeddings import Embedding

LogitsCache = ByteLRU[tuple[str, Prompts], Tensor]


@dataclass(frozen=True)
class Frame:
    """How the original image lies in the low-resolution map. Sizes are (height, width)."""

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    lowres_size: tuple[int, int]
    image_size: int

    @property
    def _scale(self) -> tuple[float, float]:
        """Cells per original pixel, (x, y)."""
        (height, width), (input_height, input_width) = self.original_size, self.input_size
        rows, columns = self.lowres_size
        return input_width / width * columns / self.image_size, input_height / height * rows / self.image_size

    def to_lowres(self, x: float, y: float) -> tuple[float, float]:
        """Original (x, y) to low-resolution (col, row)."""
        scale_x, scale_y = self._scale
        return x * scale_x, y * scale_y

    def to_original(self, col: float, row: float) -> tuple[float, float]:
        """Low-resolution (col, row) to original (x, y)."""
        scale_x, scale_y = self._scale
        return col / scale_x, row / scale_y

    @property
    def valid(self) -> tuple[int, int]:
        """(rows, cols): the leading part of the map whose cells touch the image; the rest is padding."""
        (height, width), (rows, columns) = self.input_size, self.lowres_size
        return math.ceil(height * rows / self.image_size), math.ceil(width * columns / self.image_size)


@dataclass(frozen=True)
class Decoded:
    """One answer of the frozen decoder. Tensors are float32 on the backbone's device.

    logits: (h, w), the chosen mask; upscaled: (C, h, w) and hyper: (C,), whose inner product the logits are;
    candidates: (K, h, w) and candidate_iou: (K,), the multimask hypotheses, whichever mask was chosen.
    colours: (3, h, w), the image itself, RGB in [0, 1].
    """

    logits: Tensor
    predicted_iou: float
    upscaled: Tensor
    hyper: Tensor
    candidates: Tensor
    candidate_iou: Tensor
    colours: Tensor
    frame: Frame


def decode(backbone: Backbone, embedding: Embedding, prompts: Prompts, mask_input: Tensor | None = None) -> Decoded:
    """Decode one prompt set; `mask_input`: low-resolution logits (1, h, w) of the round before.

    A single click without box and without `mask_input` takes the multimask output with the highest predicted IoU, any
    other prompt set the single mask. Raises ValueError when there is no prompt.
    """
    return decode_batch(backbone, embedding, [prompts], mask_input)[0]


@torch.no_grad()
def decode_batch(
    backbone: Backbone, embedding: Embedding, batch: Sequence[Prompts], mask_input: Tensor | None = None
) -> list[Decoded]:
    """`decode` for several prompt sets on one image in one pass.

    All must have the same number of clicks, and all or none a box; they share `mask_input`. Raises ValueError.
    """
    if any(not prompts.clicks and prompts.box is None for prompts in batch):
        raise ValueError("There is nothing to decode: give at least one click or a box.")
    if len({(len(prompts.clicks), prompts.box is None) for prompts in batch}) != 1:
        raise ValueError("Prompt sets of one batch must have the same number of clicks, and all or none a box.")
    sam = backbone.sam
    points, boxes = _to_input_frame(backbone, embedding, batch)
    masks = None
    if mask_input is not None:
        masks = mask_input.to(backbone.device, torch.float32)[None].expand(len(batch), -1, -1, -1)
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
    features = embedding.features.to(backbone.device, torch.float32)
    candidates, iou, upscaled, hyper = backbone.decoder(features, sparse, dense)

    first = len(batch[0].clicks) == 1 and boxes is None and masks is None
    chosen = iou[:, 1:].argmax(dim=1) + 1 if first else torch.zeros(len(batch), dtype=torch.long, device=iou.device)
    colours = embedding.colours.to(backbone.device, torch.float32) / 255.0
    frame = Frame(embedding.original_size, embedding.input_size, _size(candidates), backbone.image_size)
    return [
        Decoded(
            logits=candidates[i, k],
            predicted_iou=float(iou[i, k]),
            upscaled=upscaled[i],
            hyper=hyper[i, k],
            candidates=candidates[i, 1:],
            candidate_iou=iou[i, 1:],
            colours=colours,
            frame=frame,
        )
        for i, k in enumerate(chosen.tolist())
    ]


def decode_session(
    backbone: Backbone, embedding: Embedding, prompts: Prompts, logits_cache: LogitsCache | None = None, key: str = ""
) -> Decoded:
    """Answer a whole prompt list the way the clicks came: each round is fed the logits of the round before.

    The box, where there is one, is the first round. The result depends on image and prompts alone: `logits_cache`
    (under `key`, which must name image and backbone) only saves rounds that were decoded before.
    Raises ValueError when there is no prompt.
    """
    rounds = [Prompts(clicks=prompts.clicks[:count], box=prompts.box) for count in range(len(prompts.clicks) + 1)]
    if prompts.box is None:
        rounds = rounds[1:]
    if not rounds:
        raise ValueError("There is nothing to decode: give at least one click or a box.")
    start, mask_input = 0, None
    if logits_cache is not None:
        for index in range(len(rounds) - 1, 0, -1):
            mask_input = logits_cache.get((key, rounds[index - 1]))
            if mask_input is not None:
                start = index
                break
    for given in rounds[start:]:
        decoded = decode(backbone, embedding, given, mask_input)
        mask_input = decoded.logits[None]
        if logits_cache is not None:
            # A copy: the logits are a view that would keep every candidate mask in memory.
            logits_cache.put((key, given), mask_input.clone(), mask_input.numel() * mask_input.element_size())
    return decoded


def _to_input_frame(
    backbone: Backbone, embedding: Embedding, batch: Sequence[Prompts]
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Clicks (B, N, 2) with labels (B, N), and boxes (B, 4), in pixels of the padded input, or None."""
    transform, device = ResizeLongestSide(backbone.image_size), backbone.device
    points = boxes = None
    if batch[0].clicks:
        xy = np.array([[(click.x, click.y) for click in prompts.clicks] for prompts in batch])
        labels = [[int(click.positive) for click in prompts.clicks] for prompts in batch]
        points = (
            torch.as_tensor(transform.apply_coords(xy, embedding.original_size), dtype=torch.float32, device=device),
            torch.tensor(labels, dtype=torch.int, device=device),
        )
    if batch[0].box is not None:
        corners = np.array([(p.box.x0, p.box.y0, p.box.x1, p.box.y1) for p in batch if p.box is not None])
        boxes = torch.as_tensor(
            transform.apply_boxes(corners, embedding.original_size), dtype=torch.float32, device=device
        )
    return points, boxes


def _size(maps: Tensor) -> tuple[int, int]:
    height, width = maps.shape[-2:]
    return height, width
