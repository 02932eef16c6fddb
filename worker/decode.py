"""Prompts and an embedding to low-resolution logits, with everything that the head and the proposal need beside them.

Coordinates are those of `worker.frame`. Clicks go to the prompt encoder as `SamPredictor.predict` sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from worker.backbones import Backbone
from worker.backbones.fast_decoder import DecoderOutput
from worker.byte_lru import ByteLRU
from worker.contract import Prompts
from worker.encode import Embedding
from worker.frame import Frame
from worker.mirror import mirrored_boxes, mirrored_map, mirrored_points
from worker.zoom import Look, Round, carried_over, follow


@dataclass(frozen=True)
class Earlier:
    """A round as the next one needs it: logits (h, w) float32, and how they lie on the image."""

    logits: Tensor
    frame: Frame


LogitsCache = ByteLRU[tuple[str, Prompts], Earlier]


@dataclass(frozen=True)
class Decoded:
    """One answer of the frozen decoder. Tensors are float32 on the backbone's device.

    logits: (h, w), the chosen mask; upscaled: (C, h, w) and hyper: (C,), whose inner product the logits are;
    candidates: (K, h, w) and candidate_iou: (K,), the multimask hypotheses, whichever mask was chosen.
    colours: (3, h, w), the image itself, RGB in [0, 1]. embedding: what was decoded, to decode other prompts with.
    """

    logits: Tensor
    predicted_iou: float
    upscaled: Tensor
    hyper: Tensor
    candidates: Tensor
    candidate_iou: Tensor
    colours: Tensor
    frame: Frame
    embedding: Embedding


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

    All must have the same number of clicks, and all or none a box; they share `mask_input`. Of the clicks on a part of
    an image only those count that lie in it. Raises ValueError.
    """
    frame = _frame(backbone, embedding)
    batch = [frame.visible(prompts) for prompts in batch]
    if any(not prompts.clicks and prompts.box is None for prompts in batch):
        raise ValueError("There is nothing to decode: give at least one click or a box.")
    if len({(len(prompts.clicks), prompts.box is None) for prompts in batch}) != 1:
        raise ValueError("Prompt sets of one batch must have the same number of clicks, and all or none a box.")
    views = [_view(backbone, embedding, number, batch, mask_input) for number in range(len(embedding.features))]

    logits, iou = _mean([view.logits for view in views]), _mean([view.iou for view in views])
    first = len(batch[0].clicks) == 1 and batch[0].box is None and mask_input is None
    chosen = iou[:, 1:].argmax(dim=1) + 1 if first else torch.zeros(len(batch), dtype=torch.long, device=iou.device)
    colours = embedding.colours.to(backbone.device, torch.float32) / 255.0
    made = []
    for i, k in enumerate(chosen.tolist()):
        upscaled, hyper = views[0].upscaled[i], views[0].hyper[i, k]
        if len(views) > 1:  # the products are what a mean can be taken of
            upscaled = _mean([view.upscaled[i] * view.hyper[i, k][:, None, None] for view in views])
            hyper = torch.ones_like(hyper)
        made.append(
            Decoded(
                logits=logits[i, k],
                predicted_iou=float(iou[i, k]),
                upscaled=upscaled,
                hyper=hyper,
                candidates=logits[i, 1:],
                candidate_iou=iou[i, 1:],
                colours=colours,
                frame=frame,
                embedding=embedding,
            )
        )
    return made


def _view(
    backbone: Backbone, embedding: Embedding, number: int, batch: Sequence[Prompts], mask_input: Tensor | None
) -> DecoderOutput:
    """What the decoder answers to one of the embedding's views; of the mirrored one, mirrored back."""
    frame, sam = _frame(backbone, embedding), backbone.sam
    points, boxes = _to_input_frame(backbone, embedding, batch)
    masks = None
    if mask_input is not None:
        masks = mask_input.to(backbone.device, torch.float32)[None].expand(len(batch), -1, -1, -1)
    if number:
        points = None if points is None else (mirrored_points(points[0], frame), points[1])
        boxes = None if boxes is None else mirrored_boxes(boxes, frame)
        masks = None if masks is None else mirrored_map(masks, frame)
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
    features = embedding.features[number : number + 1].to(backbone.device, torch.float32)
    # Without a mask input the prompt encoder thinks of the whole square.
    output = backbone.decoder(features, sparse, dense[..., : features.shape[-2], : features.shape[-1]])
    if number:
        mirrored = {"logits": mirrored_map(output.logits, frame), "upscaled": mirrored_map(output.upscaled, frame)}
        return output._replace(**mirrored)
    return output


def _mean(values: Sequence[Tensor]) -> Tensor:
    first, *others = values
    for other in others:
        first = first + other
    return first / len(values) if others else first


def decode_next(
    backbone: Backbone, embedding: Embedding, prompts: Prompts, before: Round | None, look: Look | None = None
) -> Decoded:
    """`decode` fed with the round before, where there was one. With `look`, which encodes parts of the image, a
    backbone that zooms decodes the part that holds the object (`worker.zoom`); where it is, a first round finds out."""
    if before is None:
        first = decode(backbone, embedding, prompts)
        near = _near(backbone, first, prompts, look)
        return first if near is None else _fed_with(first, backbone, near, prompts)
    return _fed_with(before, backbone, _near(backbone, before, prompts, look) or embedding, prompts)


def _near(backbone: Backbone, before: Round, prompts: Prompts, look: Look | None) -> Embedding | None:
    if look is None or not backbone.zoom:
        return None
    window = follow(before, prompts)
    return None if window is None else look(window)


def _fed_with(before: Round, backbone: Backbone, embedding: Embedding, prompts: Prompts) -> Decoded:
    return decode(backbone, embedding, prompts, carried_over(before, _frame(backbone, embedding)))


def decode_session(
    backbone: Backbone,
    embedding: Embedding,
    prompts: Prompts,
    logits_cache: LogitsCache | None = None,
    key: str = "",
    look: Look | None = None,
) -> Decoded:
    """Answer a whole prompt list the way the clicks came: each round is fed the logits of the round before.

    The box, where there is one, is the first round. The result depends on image and prompts alone (and on whether
    there is a `look`, see `decode_next`): `logits_cache` (under `key`, which must name image and backbone) only saves
    rounds that were decoded before. Raises ValueError when there is no prompt.
    """
    rounds = [Prompts(clicks=prompts.clicks[:count], box=prompts.box) for count in range(len(prompts.clicks) + 1)]
    if prompts.box is None:
        rounds = rounds[1:]
    if not rounds:
        raise ValueError("There is nothing to decode: give at least one click or a box.")
    start = 0
    before: Round | None = None
    if logits_cache is not None:
        for index in range(len(rounds) - 1, 0, -1):
            before = logits_cache.get((key, rounds[index - 1]))
            if before is not None:
                start = index
                break
    for given in rounds[start:]:
        decoded = decode_next(backbone, embedding, given, before, look)
        before = decoded
        if logits_cache is not None:
            # A copy: the logits are a view that would keep every candidate mask in memory.
            kept = Earlier(decoded.logits.clone(), decoded.frame)
            logits_cache.put((key, given), kept, kept.logits.numel() * kept.logits.element_size())
    return decoded


def _to_input_frame(
    backbone: Backbone, embedding: Embedding, batch: Sequence[Prompts]
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Clicks (B, N, 2) with labels (B, N), and boxes (B, 4), in pixels of the padded input, or None."""
    transform, device = ResizeLongestSide(backbone.image_size), backbone.device
    seen = _frame(backbone, embedding).seen
    points = boxes = None
    if batch[0].clicks:
        xy = np.array([[(click.x - seen.x0, click.y - seen.y0) for click in prompts.clicks] for prompts in batch])
        labels = [[int(click.positive) for click in prompts.clicks] for prompts in batch]
        points = (
            torch.as_tensor(transform.apply_coords(xy, seen.size), dtype=torch.float32, device=device),
            torch.tensor(labels, dtype=torch.int, device=device),
        )
    if batch[0].box is not None:
        corners = np.array([(p.box.x0, p.box.y0, p.box.x1, p.box.y1) for p in batch if p.box is not None])
        corners -= np.array([seen.x0, seen.y0, seen.x0, seen.y0])
        boxes = torch.as_tensor(transform.apply_boxes(corners, seen.size), dtype=torch.float32, device=device)
    return points, boxes


def _frame(backbone: Backbone, embedding: Embedding) -> Frame:
    rows, columns = embedding.features.shape[-2:]
    size, padded = (4 * rows, 4 * columns), (backbone.stride * rows, backbone.stride * columns)
    return Frame(embedding.original_size, embedding.input_size, size, padded, embedding.window)
