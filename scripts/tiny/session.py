"""Clicking sessions on a batch: prompts that grow, masks fed back, the losses of the steps that are learnt from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from tiny import clicks
from tiny.decoding import CORNER, NEGATIVE, NOTHING, OTHER_CORNER, POSITIVE, decode, prompt_tokens
from tiny.losses import iou, mask_loss


@dataclass
class Prompts:
    """Prompts of N objects, equally many each: points N x T x 2 ((x, y), input frame) and kinds N x T."""

    points: np.ndarray
    kinds: np.ndarray

    @classmethod
    def start(
        cls,
        truths: np.ndarray,
        rng: np.random.Generator,
        clickers: clicks.Clickers,
        *,
        box_share: float,
        centre: bool = False,
    ) -> Prompts:
        """A first click in every object, or now and then a box about it; both are two tokens in SAM."""
        points, kinds = np.zeros((len(truths), 2, 2)), np.full((len(truths), 2), NOTHING)
        for n, placed in enumerate(clickers.starts(truths, rng, box_share=box_share, centre=centre)):
            points[n, : len(placed)] = clicks.to_frame(placed)
            kinds[n, : len(placed)] = (CORNER, OTHER_CORNER) if len(placed) == 2 else POSITIVE
        return cls(points, kinds)

    def add(self, corrections: Iterable[tuple[int, int, bool]]) -> None:
        """Add a click (x, y, positive), in pixels of the low-resolution mask, to every object."""
        made = list(corrections)
        xy = clicks.to_frame(np.array([click[:2] for click in made], float))
        kinds = np.where([click[2] for click in made], POSITIVE, NEGATIVE)
        self.points = np.concatenate([self.points, xy[:, None]], 1)
        self.kinds = np.concatenate([self.kinds, kinds[:, None]], 1)

    def tokens(self, sam: Sam) -> Tensor:
        """N x T x C."""
        device = sam.device
        points = torch.as_tensor(self.points, dtype=torch.float32, device=device)
        return prompt_tokens(sam, points, torch.as_tensor(self.kinds, device=device))


def normalise(sam: Sam, image: Tensor, valid: Tensor) -> Tensor:
    """uint8 B x 3 x S x S and B x 2 (height, width) to what `Sam.preprocess` makes: padding is 0 after normalising."""
    size = image.shape[-1]
    pixels = torch.arange(size, device=image.device)
    inside = (pixels[None, :, None] < valid[:, :1, None]) & (pixels[None, None] < valid[:, 1:, None])
    return (image.float() - sam.pixel_mean) / sam.pixel_std * inside[:, None]


def best_by_prediction(logits: Tensor, predicted: Tensor) -> Tensor:
    """The alternative (1..3) with the highest predicted IoU: N x 4 x H x W, N x 4 to N x 1 x H x W."""
    chosen = predicted[:, 1:].argmax(1) + 1
    return logits[torch.arange(len(logits)), chosen][:, None]


class Step(NamedTuple):
    """One decode of a session: whether the prompts are those of the step before, and whether it is learnt from."""

    again: bool
    learnt: bool


def plan(rng: np.random.Generator) -> list[Step]:
    """The decodes of this batch. The first is learnt from, always; then another look with the same prompts, as the
    object is looked at from near once it is known where it is; or the next click, or a later one that a run of clicks
    without gradient leads to, so that the model also meets its own masks after many clicks."""
    kind = rng.random()
    if kind < 0.2:
        return [Step(again=False, learnt=True), Step(again=True, learnt=True)]
    between = 0 if kind < 0.58 else int(rng.integers(1, 4)) if kind < 0.85 else int(rng.integers(4, 13))
    looks = [Step(again=True, learnt=False)] if rng.random() < 0.5 else []
    clicks = [Step(again=False, learnt=False)] * between
    return [Step(again=False, learnt=True), *looks, *clicks, Step(again=False, learnt=True)]


def from_afar(logits: Tensor, times: int) -> Tensor:
    """Logits N x 1 x h x w as they are where the model saw the object so many times smaller."""
    if times == 1:
        return logits
    smaller = F.avg_pool2d(logits, times)
    return F.interpolate(smaller, size=logits.shape[-2:], mode="bilinear", align_corners=False)


def session_loss(
    sam: Sam,
    embeddings: Tensor,
    truths: Tensor,
    known: clicks.Mask,
    rng: np.random.Generator,
    steps: list[Step],
    clickers: clicks.Clickers,
    *,
    box_share: float,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one simulated session per object, of which `steps` (see `plan`) says what counts, and what to log.

    `embeddings` N x C x h x w (repeated per object), `truths` bool N x 4h x 4w, and the same as `known`, where clicks
    are made: a device that is still at work on the embeddings is not waited for.
    """
    prompts = Prompts.start(known, rng, clickers, box_share=box_share)
    image_pe = sam.prompt_encoder.get_dense_pe()
    target = truths[:, None].float()
    total = embeddings.new_zeros((), dtype=torch.float32)
    log: dict[str, Tensor] = {}
    previous: Tensor | None = None
    for number, step in enumerate(steps):
        if previous is not None and step.again:
            previous = from_afar(previous, int(rng.choice((1, 2, 4))))
        elif previous is not None:
            masks = (previous[:, 0] > 0).cpu().numpy()
            prompts.add(clickers.corrections(known, masks, rng, centre=False))
        with torch.set_grad_enabled(step.learnt):
            logits, predicted = decode(sam, embeddings, image_pe, prompts.tokens(sam), previous)
            if number == 0:
                losses, true_iou = mask_loss(logits, target), iou(logits, target)
                best = losses[:, 1:].min(1).values
                # The mean keeps alternatives alive that are never the best.
                mask_part = (best + 0.05 * losses[:, 1:].mean(1) + 0.3 * losses[:, 0]).mean()
                total = total + mask_part + (predicted - true_iou).square().mean()
                shown = best_by_prediction(logits, predicted)
            else:
                shown = logits[:, :1]
                if step.learnt:
                    true_iou = iou(shown, target)
                    total = total + mask_loss(shown, target).mean() + (predicted[:, :1] - true_iou).square().mean()
        if step.learnt:
            log["first" if number == 0 else "again" if step.again else "last"] = iou(shown, target).mean()
        previous = shown.detach().float()
    return total / sum(step.learnt for step in steps), {name: float(value) for name, value in log.items()}
