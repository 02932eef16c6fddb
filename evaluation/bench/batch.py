"""Images of a batch each second, beside a bare loop of encode and decode on pixels that lie ready."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from PIL import Image

from evaluation.bench.setup import Bench, synchronise
from worker import batch
from worker.contract import Click, ImageRef, ObjectPrompts, PrelabelImage, PrelabelItem, PrelabelOptions, Prompts
from worker.decode import decode
from worker.encode import encode_resized, resize
from worker.runtime import Runtime

WIDTH, HEIGHT = 1024, 1024


def measure(bench: Bench) -> dict[str, Any]:
    """`batch`: images each second, and `batch_ratio`: throughput of the batch by that of the bare loop, by backbone.

    The loop encodes and decodes one click. A batch also reads the files, decides, proposes, up-samples, writes RLE.
    """
    found: dict[str, Any] = {"batch": {}, "batch_ratio": {}}
    for name in bench.backbones:
        bench.say(f"batch: {name}")
        current = Runtime(bench.runtime_options(name))
        count = bench.count(*((24, 4) if name == "tiny" else (3, 1)))
        files = [bench.image(f"batch-{number}", number, WIDTH, HEIGHT) for number in range(count)]
        click = Prompts(clicks=(Click(x=WIDTH / 2, y=HEIGHT / 2),))
        prompts = ObjectPrompts(prompts=click)
        items = [PrelabelItem(key=file.name, image=ImageRef(url=str(file)), objects=(prompts,)) for file in files]
        pixels = [resize(current.backbone, np.array(Image.open(file))) for file in files]
        loop: list[float] = []
        whole: list[float] = []
        for turn in range(bench.count(4, 2) if name == "tiny" else 2):
            began = time.perf_counter()
            for resized in pixels if turn or not bench.quick else pixels[:1]:
                decode(current.backbone, encode_resized(current.backbone, resized, (HEIGHT, WIDTH)), click)
            synchronise(current.backbone)
            middle = time.perf_counter()
            answers = list(batch.run(items if turn or not bench.quick else items[:1], PrelabelOptions(), current))
            ended = time.perf_counter()
            if wrong := [one for one in answers if not isinstance(one, PrelabelImage)]:
                raise RuntimeError(f"A batch of the benchmark failed: {wrong[0].error}")
            if turn:  # the first turn warms up
                loop.append((middle - began) / count)
                whole.append((ended - middle) / count)
        bare, all_of_it = float(np.median(loop)), float(np.median(whole))
        found["batch"][name] = {
            "loop_images_s": round(1 / bare, 3),
            "images_s": round(1 / all_of_it, 3),
            "images": count,
            "turns": len(whole),
        }
        found["batch_ratio"][name] = round(float(np.median(np.array(loop) / np.array(whole))), 3)
    return found
