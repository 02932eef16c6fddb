"""Ways to run the image encoder on this machine, beside the published one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from segment_anything import sam_model_registry
from torch import Tensor

from evaluation.bench.setup import Bench, synchronise
from worker.backbones import Backbone
from worker.contract import Click, Prompts
from worker.decode import decode
from worker.embeddings import Embedding
from worker.masks import to_mask
from worker.precision import half_precision, running_in

OBJECTS = 8


def measure(bench: Bench) -> dict[str, Any]:
    """`encoder`: by backbone and way seconds for an image, the speed beside float32 as published, the relative error
    of the embedding, and the mean IoU of masks from one click."""
    found: dict[str, Any] = {}
    for name in bench.backbones:
        bench.say(f"encoder: {name}")
        backbone = bench.build(name)
        side = backbone.image_size
        image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(backbone.device)
        ways = _ways(bench, backbone)
        times: dict[str, list[float]] = {way: [] for way in ways}
        features: dict[str, Tensor] = {}
        for turn in range(bench.count(*((5, 2) if name == "tiny" else (3, 1)))):
            for way, run in ways.items():
                began = time.perf_counter()
                with torch.inference_mode():
                    features[way] = run(image).float()
                synchronise(backbone)
                if turn or bench.quick:
                    times[way].append(time.perf_counter() - began)
        reference = next(iter(ways))
        found[name] = {
            way: {
                "seconds": round(statistics.median(times[way]), 3),
                "speed_up": round(
                    statistics.median(a / b for a, b in zip(times[reference], times[way], strict=True)), 2
                ),
                "relative_error": float(_error(features[way], features[reference])),
                "mask_iou": round(_mask_iou(backbone, features[way], features[reference]), 5),
            }
            for way in ways
        }
    return {"encoder": found}


def _ways(bench: Bench, backbone: Backbone) -> dict[str, Callable[[Tensor], Tensor]]:
    ours = backbone.sam.image_encoder
    ways: dict[str, Callable[[Tensor], Tensor]] = {"float32": ours}
    if backbone.name in sam_model_registry:
        published = sam_model_registry[backbone.name]()
        published.load_state_dict(backbone.sam.state_dict(), assign=True)
        ways = {"float32 as published": published.eval().image_encoder, "float32, fused attention": ours}
    low = half_precision(backbone.device) or torch.bfloat16

    def halved(image: Tensor) -> Tensor:
        with running_in(low, backbone.device):
            features: Tensor = ours(image)
            return features

    ways[f"{str(low).removeprefix('torch.')}{', fused attention' if len(ways) > 1 else ''}"] = halved
    return ways


def _error(found: Tensor, reference: Tensor) -> Tensor:
    return ((found - reference).square().mean() / reference.square().mean()).sqrt()


def _mask_iou(backbone: Backbone, found: Tensor, reference: Tensor) -> float:
    """Mean IoU of masks of one click from both embeddings; 1 where both are empty."""
    side = backbone.image_size
    places = torch.rand(OBJECTS, 2, generator=torch.Generator().manual_seed(1)) * side
    total = 0.0
    colours = torch.zeros(3, 4 * found.shape[-2], 4 * found.shape[-1], dtype=torch.uint8)
    for x, y in places.tolist():
        prompts = Prompts(clicks=(Click(x=x, y=y),))
        masks = []
        for features in (found, reference):
            embedding = Embedding(features, colours, (side, side), (side, side))
            decoded = decode(backbone, embedding, prompts)
            masks.append(to_mask(decoded.logits, decoded.frame, prompts))
        union = int((masks[0] | masks[1]).sum())
        total += int((masks[0] & masks[1]).sum()) / union if union else 1.0
    return total / OBJECTS
