"""Ways to run the image encoder on this machine, beside the published one."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from evaluation.bench.encoder_ways import Way, left_out, ways_of
from evaluation.bench.setup import Bench, synchronise
from worker.backbones import BACKBONES, Backbone
from worker.contract import Click, Prompts
from worker.decode import decode
from worker.encode import Embedding
from worker.masks import to_mask
from worker.precision import encoder_precision

OBJECTS = 8


def measure(bench: Bench) -> dict[str, Any]:
    """`encoder`: by backbone and way seconds for an image, the speed beside float32 as published, the relative error
    of the embedding, the mean IoU of masks from one click, and whether it is `chosen` for clicks; where it is compiled
    or exported first `start_s`, seconds of that. For a way that cannot be had here `left_out`, the reason."""
    found: dict[str, Any] = {}
    for name in bench.backbones:
        bench.say(f"encoder: {name}")
        backbone = bench.build(name)
        side = backbone.image_size
        image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(backbone.device)
        chosen = encoder_precision("auto", backbone.device, bears_half=BACKBONES[name].bears_half)
        ways, missing, starts = _started(ways_of(backbone, chosen), image, bench, backbone)
        times: dict[str, list[float]] = {way: [] for way in ways}
        features: dict[str, Tensor] = {}
        for _ in range(bench.count(*((9, 2) if name == "tiny" else (3, 1)))):
            for way, made in ways.items():
                began = time.perf_counter()
                with torch.inference_mode():
                    features[way] = made.run(image).float()
                synchronise(backbone)
                times[way].append(time.perf_counter() - began)
        reference = next(iter(ways))
        found[name] = {
            way: {
                "seconds": round(statistics.median(times[way]), 5),
                "speed_up": round(
                    statistics.median(a / b for a, b in zip(times[reference], times[way], strict=True)), 2
                ),
                "relative_error": float(_error(features[way], features[reference])),
                "mask_iou": round(_mask_iou(backbone, features[way], features[reference]), 5),
                "chosen": made.chosen,
            }
            | ({"start_s": round(starts[way], 2)} if made.slow_start else {})
            for way, made in ways.items()
        } | {way: {"left_out": why} for way, why in missing.items()}
    return {"encoder": found}


def _started(
    ways: dict[str, Way], image: Tensor, bench: Bench, backbone: Backbone
) -> tuple[dict[str, Way], dict[str, str], dict[str, float]]:
    """The ways that run here, each run once; why the others do not; and seconds that the making of each took, with what
    its first image took more than its second."""
    working: dict[str, Way] = {}
    missing: dict[str, str] = {}
    starts: dict[str, float] = {}
    for name, way in ways.items():
        if way.slow_start and bench.quick:
            missing[name] = "it takes too long to start for a quick run"
            continue
        bench.say(f"encoder: {name}")
        try:
            began = time.perf_counter()
            way.make()
            made = time.perf_counter() - began
            spent = []
            for _ in range(2 if way.slow_start else 1):
                began = time.perf_counter()
                with torch.inference_mode():
                    way.run(image)
                    synchronise(backbone)
                spent.append(time.perf_counter() - began)
        except Exception as error:  # compilers, exporters and their packages each fail in their own way
            missing[name] = left_out(error)
            continue
        working[name], starts[name] = way, made + max(0.0, spent[0] - spent[-1])
    return working, missing, starts


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
