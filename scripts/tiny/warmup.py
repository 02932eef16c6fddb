"""The decoder's first lesson, without images: what a click means.

Random label maps stand in for images: every segment has a random code, the embedding is the map of codes at stride 8,
and the object is the segment that was clicked. A few hundred cheap steps teach the decoder to act around a click and to
look up what lies under it; without them the first half hour of a short run goes into that.
"""

from __future__ import annotations

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from tiny.clicks import Clickers
from tiny.session import plan, session_loss
from worker.backbones.tiny import resize_tiny


def random_maps(rng: np.random.Generator, count: int, side: int, dim: int) -> tuple[Tensor, Tensor]:
    """`count` embeddings (N x dim x side/8 x side/8) and the object in each (bool, N x side/2 x side/2).

    Segments are Voronoi cells of stretched distances; now and then another cell has the object's code but is not it.
    """
    low = side // 2
    axis = (np.arange(low) + 0.5) / low
    x, y = np.meshgrid(axis, axis)
    embeddings, truths = [], []
    while len(truths) < count:
        cells = int(rng.integers(3, 12))
        centres, scales = rng.random((cells, 2)), np.exp(rng.normal(0, 0.5, (cells, 2)))
        offsets = (np.stack([x, y], -1)[None] - centres[:, None, None]) * scales[:, None, None]
        labels = (offsets**2).sum(-1).argmin(0)
        truth = labels == rng.integers(cells)
        if not 8 <= truth.sum() <= 0.8 * truth.size:
            continue
        codes = rng.standard_normal((cells, dim)).astype(np.float32)
        if rng.random() < 0.3:
            codes[rng.integers(cells)] = codes[labels[truth][0]]
        shares = F.avg_pool2d(F.one_hot(torch.from_numpy(labels), cells).permute(2, 0, 1).float(), 4)
        noise = torch.from_numpy(rng.standard_normal((dim, side // 8, side // 8), np.float32))
        embeddings.append(torch.einsum("cd,chw->dhw", torch.from_numpy(codes), shares) + 0.1 * noise)
        truths.append(torch.from_numpy(truth))
    return F.layer_norm(torch.stack(embeddings).permute(0, 2, 3, 1), (dim,)).permute(0, 3, 1, 2), torch.stack(truths)


def warm_up(sam: Sam, *, steps: int, side: int, count: int, lr: float, seed: int) -> list[float]:
    """Train the prompt encoder and the mask decoder of `sam`; returns each step's IoU after the first click."""
    resize_tiny(sam, side)
    parameters = [*sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    curve, clickers = [], Clickers()
    sam.train()
    for step in range(steps):
        rng = np.random.default_rng((seed, 55, step))
        embeddings, truths = random_maps(rng, count, side, sam.prompt_encoder.embed_dim)
        factor = min((step + 1) / 20, 1, 5 * (1 - step / steps))  # a plateau of some 300 steps needs the full rate
        for group in optimiser.param_groups:
            group["lr"] = lr * factor
        inputs = embeddings.to(sam.device), truths.to(sam.device), truths.numpy()
        loss, log = session_loss(sam, *inputs, rng, plan(rng), clickers, box_share=0.12)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        curve.append(log["first"])
        if step % 20 == 19:
            reached = np.mean(curve[-20:])
            print(f"decoder warm-up: step {step + 1} of {steps}, IoU after one click {reached:.3f}", flush=True)
    return curve
