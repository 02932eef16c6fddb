"""Clicks to time: on the objects of a drawn scene, where an annotator makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.bench.setup import Bench, scene
from evaluation.clicker import Mask, human_like_click
from worker.contract import Prompts
from worker.decode import Decoded, decode_next
from worker.masks import to_mask
from worker.zoom import looker

#: Clicks on each object.
CLICKS_EACH = 4
Clicks = list[tuple[float, float, bool]]  # (x %, y %, positive)
#: A click to be made once, so that an image is encoded.
MIDDLE: Clicks = [(50.0, 50.0, True)]


def clicks_on(bench: Bench, image: Path, seed: int, size: tuple[int, int], objects: int) -> list[Clicks]:
    """The human-like user's clicks on so many objects of the scene `seed` of `size` (width, height), drawn in `image`;
    where there are fewer, some come again, with other clicks. They answer the masks of `tiny`, whatever is timed:
    masks of random weights are noise."""
    width, height = size
    backbone, labels, rng = bench.build("tiny"), scene(seed, height, width).labels, np.random.default_rng(seed)
    most = bench.count(CLICKS_EACH, 2)
    embedding, look = bench.encoded(backbone, image), looker(backbone, np.array(Image.open(image)))

    def session(truth: Mask) -> Iterator[tuple[float, float, bool]]:
        before: Decoded | None = None
        prompts, mask = Prompts(), np.zeros(truth.shape, bool)
        while len(prompts.clicks) < most and (click := human_like_click(truth, mask, prompts.clicks, rng)):
            prompts = Prompts(clicks=(*prompts.clicks, click))
            before = decode_next(backbone, embedding, prompts, before, look)
            mask = to_mask(before.logits, before.frame, prompts)
            yield 100 * click.x / width, 100 * click.y / height, click.positive

    numbers = np.resize(rng.permutation(np.arange(1, labels.max() + 1)), objects)
    return [list(session(labels == number)) for number in numbers]
