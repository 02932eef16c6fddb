"""The objects of one encoded image in a batch: what their prompts mean, their masks, and the regions these become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from worker import brush_rle
from worker.contract import ObjectPrompts, PrelabelImage, PrelabelItem, PrelabelOptions, Prompts, Proposal, Region
from worker.decode import Decoded, decode, decode_batch, decode_session
from worker.encode import Embedding
from worker.everything import segment_everything
from worker.frame import Frame
from worker.masks import to_mask
from worker.outlines import prompts_of, rings
from worker.preemption import stand_by
from worker.runtime import Runtime
from worker.tasks import JobError, in_image
from worker.zoom import Look

#: Single clicks that are decoded in one pass.
DECODE_BATCH = 16


@dataclass(frozen=True)
class Decided:
    """An object that was decided on: what its region is made from. `logits`: (h, w) float32."""

    logits: Tensor
    frame: Frame
    prompts: Prompts
    label: str | None
    predicted_iou: float
    expected_iou: float
    proposal: Proposal | None


def decide(
    item: PrelabelItem, embedding: Embedding, options: PrelabelOptions, current: Runtime, look: Look | None = None
) -> list[Decided]:
    """Decode every object of an item, from near with a `look`, and decide on its mask and its next click."""
    backbone, proposer = current.backbone, current.proposer_of(item.image.project)
    objects = []
    for label, prompts, decoded in _decoded(item, embedding, current, look):
        stand_by()
        decision = proposer.propose(
            decoded,
            prompts,
            strategy=options.strategy,
            redecode=partial(decode, backbone, decoded.embedding),
        )
        # A copy: the logits may be a view that would keep every candidate mask in memory.
        logits, proposal = decision.logits.clone(), decision.proposal if options.propose else None
        iou = min(max(decoded.predicted_iou, 0.0), 1.0)
        objects.append(Decided(logits, decoded.frame, prompts, label, iou, decision.expected_iou, proposal))
    return objects


def _decoded(
    item: PrelabelItem, embedding: Embedding, current: Runtime, look: Look | None
) -> Iterator[tuple[str | None, Prompts, Decoded]]:
    """(label, prompts in pixels of the image, what the decoder says) of each object."""
    backbone = current.backbone
    if item.everything is not None:
        for prompts, decoded in segment_everything(backbone, embedding, item.everything):
            yield item.everything.label, prompts, decoded
    given = [(one.label, known) for one in item.objects if (known := _prompts(one, item, embedding)) is not None]
    single = [one for one in given if look is None and _is_one_click(one[1])]
    for start in range(0, len(single), DECODE_BATCH):
        stand_by()
        part = single[start : start + DECODE_BATCH]
        answers = decode_batch(backbone, embedding, [prompts for _, prompts in part])
        for (label, prompts), decoded in zip(part, answers, strict=True):
            yield label, prompts, decoded
    for label, prompts in given:
        if look is not None or not _is_one_click(prompts):
            stand_by()
            yield label, prompts, decode_session(backbone, embedding, prompts, look=look)


def _is_one_click(prompts: Prompts) -> bool:
    return len(prompts.clicks) == 1 and prompts.box is None


def _prompts(one: ObjectPrompts, item: PrelabelItem, embedding: Embedding) -> Prompts | None:
    """The prompts of an object in pixels of the image; None for an empty brush."""
    height, width = embedding.original_size
    frame = (item.height or height, item.width or width)
    given: Prompts | None = one.prompts
    if one.brush:
        try:
            mask = brush_rle.decode(one.brush, *frame)
        except ValueError as error:
            raise JobError(f"A brush region cannot be read: {error}", "Draw it again.", 422) from error
        given = prompts_of(mask)
    if given is None:
        return None
    return in_image(given, frame, embedding.original_size)


def regions(
    item: PrelabelItem, size: tuple[int, int], objects: list[Decided], options: PrelabelOptions
) -> PrelabelImage:
    """The answer for an image of `size` (height, width): regions, of the item's size, of the objects with a mask."""
    height, width = item.height or size[0], item.width or size[1]
    found, best = [], None
    for one in objects:
        mask = to_mask(one.logits, one.frame, one.prompts, (height, width))
        area = int(np.count_nonzero(mask))
        outlines = rings(mask) if options.polygons else []
        if not area or (options.polygons and not outlines):
            continue
        found.append(
            Region(
                label=one.label,
                rle=[] if options.polygons else brush_rle.encode(mask),
                rings=outlines,
                area=area,
                predicted_iou=one.predicted_iou,
                expected_iou=one.expected_iou,
            )
        )
        if one.proposal is not None and (best is None or one.proposal.score > best.score):
            best = one.proposal
    if best is not None:
        best = best.model_copy(update={"x": best.x * width / size[1], "y": best.y * height / size[0]})
    confidence = sum(region.expected_iou for region in found) / len(found) if found else 0.0
    return PrelabelImage(
        key=item.key, width=width, height=height, regions=tuple(found), confidence=confidence, proposal=best
    )
