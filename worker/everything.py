"""Masks of what is on an image, without prompts: a click on each point of a grid, and what the filters leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from worker.backbones import Backbone
from worker.contract import Click, Everything, Prompts
from worker.decode import Decoded, decode_batch
from worker.encode import Embedding
from worker.preemption import stand_by

#: Points decoded in one pass.
BATCH = 16
#: Logits at whose thresholds a stable mask hardly differs, as in Segment Anything's mask generator.
STABILITY_OFFSET = 1.0
#: Side of the small masks by which overlap is measured.
SMALL = 64
#: Least predicted IoU and stability where a job names none. `tiny` promises little and its edges are soft: by the
#: measure of the others nothing that it finds would stay.
LEAST = {"tiny": (0.4, 0.1)}
LEAST_OF_OTHERS = (0.7, 0.8)


@dataclass(frozen=True)
class Candidate:
    """The mask that a click on (x, y) gives: `quality` orders candidates, `small` is its mask, flat, float32 0 or 1."""

    x: float
    y: float
    quality: float
    small: Tensor


def segment_everything(backbone: Backbone, embedding: Embedding, options: Everything) -> list[tuple[Prompts, Decoded]]:
    """The best masks, best first; each is exactly what a click on its point gives."""
    options = suited(options, backbone.name)
    candidates: list[Candidate] = []
    points = grid(embedding.original_size, options.points_per_side)
    for start in range(0, len(points), BATCH):
        stand_by()
        chosen = points[start : start + BATCH]
        prompts = [Prompts(clicks=(Click(x=x, y=y),)) for x, y in chosen]
        for (x, y), decoded in zip(chosen, decode_batch(backbone, embedding, prompts), strict=True):
            candidate = judge(decoded, x, y, options)
            if candidate is not None:
                candidates.append(candidate)
    kept = without_overlap(candidates, options.max_overlap)[: options.top]
    found: list[tuple[Prompts, Decoded]] = []
    # All masks of the grid would be gigabytes: the few that stay are decoded again.
    for start in range(0, len(kept), BATCH):
        stand_by()
        prompts = [Prompts(clicks=(Click(x=one.x, y=one.y),)) for one in kept[start : start + BATCH]]
        found += zip(prompts, decode_batch(backbone, embedding, prompts), strict=True)
    return found


def suited(options: Everything, backbone: str) -> Everything:
    """`options` with the least predicted IoU and stability that suit a backbone, where they name none."""
    iou, stability = LEAST.get(backbone, LEAST_OF_OTHERS)
    return options.model_copy(
        update={
            "min_iou": iou if options.min_iou is None else options.min_iou,
            "min_stability": stability if options.min_stability is None else options.min_stability,
        }
    )


def grid(size: tuple[int, int], per_side: int) -> list[tuple[float, float]]:
    """Centres (x, y), in pixels, of per_side x per_side equal parts of an image of `size` (height, width)."""
    height, width = size
    steps = [(i + 0.5) / per_side for i in range(per_side)]
    return [(x * width, y * height) for y in steps for x in steps]


def judge(decoded: Decoded, x: float, y: float, options: Everything) -> Candidate | None:
    """The candidate of one decoded click; None if a filter on predicted IoU, stability or size drops it. A filter that
    is None keeps all."""
    if options.min_iou is not None and decoded.predicted_iou < options.min_iou:
        return None
    rows, cols = decoded.frame.valid
    logits = decoded.logits[:rows, :cols]
    inside = int((logits > 0).sum())
    if not options.min_area <= inside / (rows * cols) <= options.max_area:
        return None
    stability = stability_score(logits)
    if options.min_stability is not None and stability < options.min_stability:
        return None
    small = F.adaptive_max_pool2d((logits > 0).float()[None], (min(SMALL, rows), min(SMALL, cols)))
    return Candidate(x, y, decoded.predicted_iou * stability, small.flatten())


def stability_score(logits: Tensor) -> float:
    """IoU of the masks at logits of +STABILITY_OFFSET and -STABILITY_OFFSET; the one contains the other."""
    high, low = int((logits > STABILITY_OFFSET).sum()), int((logits > -STABILITY_OFFSET).sum())
    return high / low if low else 0.0


def without_overlap(candidates: list[Candidate], max_overlap: float) -> list[Candidate]:
    """Best first, without those whose IoU with a better one that stays exceeds `max_overlap`."""
    if not candidates:
        return []
    ordered = sorted(candidates, key=lambda one: -one.quality)
    masks = torch.stack([one.small for one in ordered])
    shared = masks @ masks.T
    areas = masks.sum(1)
    overlap = (shared / (areas[:, None] + areas[None] - shared).clamp(min=1.0)).tolist()
    kept: list[int] = []
    for index in range(len(ordered)):
        if all(overlap[index][other] <= max_overlap for other in kept):
            kept.append(index)
    return [ordered[index] for index in kept]
