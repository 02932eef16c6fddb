"""The validation curve: held-out images, whole, one object each, the standard clicker, the model as it would ship."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from segment_anything.modeling import Sam

from tiny.clicks import Clickers
from tiny.decoding import decode
from tiny.losses import iou
from tiny.pool import SCENES
from tiny.samples import Samples
from tiny.session import Prompts, best_by_prediction, normalise


@torch.inference_mode()
def validate(
    sam: Sam, samples: Samples, clickers: Clickers, *, clicks: int = 5, limit: int = 96, batch: int = 8
) -> dict[str, Any]:
    """Mean IoU after each click over `limit` held-out images ("iou"), of photographs and of drawn scenes apart, and the
    rank correlation of predicted with true IoU ("spearman"). IoU is taken on the low-resolution mask."""
    held = [index for index, item in enumerate(samples.pool.items) if item.held_out]
    held = [held[i] for i in np.linspace(0, len(held) - 1, min(limit, len(held))).astype(int)]
    device = sam.device
    made = [(index, samples.make(index, np.random.default_rng((9, index)), augment=False)) for index in held]
    kept = [(index, sample) for index, sample in made if sample is not None]
    true, predicted = np.zeros((2, len(kept), clicks))
    for start in range(0, len(kept), batch):
        rng = np.random.default_rng((10, start))
        part = [sample for _, sample in kept[start : start + batch]]
        image = torch.stack([sample["image"] for sample in part]).to(device)
        valid = torch.stack([sample["valid"] for sample in part]).to(device)
        truths = torch.stack([sample["masks"][0] for sample in part]).to(device)
        embeddings = sam.image_encoder(normalise(sam, image, valid))
        known, previous = truths.cpu().numpy(), None
        prompts = Prompts.start(known, rng, clickers, box_share=0.0, centre=True)
        for click in range(clicks):
            logits, scores = decode(sam, embeddings, sam.prompt_encoder.get_dense_pe(), prompts.tokens(sam), previous)
            if click == 0:
                previous, score = best_by_prediction(logits, scores), scores[:, 1:].max(1).values
            else:
                previous, score = logits[:, :1], scores[:, 0]
            rows = slice(start, start + len(part))
            true[rows, click] = iou(previous, truths[:, None].float())[:, 0].cpu().numpy()
            predicted[rows, click] = score.float().cpu().numpy()
            masks = (previous[:, 0] > 0).cpu().numpy()
            prompts.add(clickers.corrections(known, masks, rng, centre=True))
    drawn = np.array([samples.pool.items[index].set == SCENES for index, _ in kept])
    result: dict[str, Any] = {"iou": true.mean(0).round(4).tolist()}
    for name, group in (("photographs", ~drawn), ("scenes", drawn)):
        if group.any():
            result[name] = true[group].mean(0).round(4).tolist()
    result["spearman"] = round(float(spearmanr(true.ravel(), predicted.ravel()).statistic), 4)
    return result
