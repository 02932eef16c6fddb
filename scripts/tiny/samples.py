"""Training samples: a crop of one image of the pool in SAM's frame, and some of its objects.

Sample i is a function of (seed, i) alone, so an interrupted run goes on with exactly the samples it would have had.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tiny.pool import SCENES, Item, Pool

MIN_PIXELS = 24  # of the low-resolution mask: smaller objects are not asked for
#: Drawn layered sections come so often beside other drawn scenes, and so many of them show the sign of their amplitude
#: alone, as seismic sections often do; of other images few are made black and white.
LAYERED = f"{SCENES} bands"
LAYERED_WEIGHT = 3.0
LAYERED_BLACK_AND_WHITE, BLACK_AND_WHITE = 0.5, 0.02


class Samples(Dataset[dict[str, Tensor]]):
    """Endless samples for one input size; see `__getitem__` for what a sample holds."""

    def __init__(self, pool: Pool, size: int, objects: int, settings: dict[str, Any], seed: int) -> None:
        """`settings`: [pool] of the configuration."""
        self.pool, self.size, self.objects, self.seed = pool, size, objects, seed
        members: dict[str, list[int]] = {}
        for index, item in enumerate(pool.items):
            if not item.held_out:
                members.setdefault(_kind(item), []).append(index)
        self.sets = list(members.values())
        weights = np.array([len(indices) ** 0.5 for indices in self.sets])
        weights *= [{LAYERED: LAYERED_WEIGHT, **settings["favour"]}.get(name, 1.0) for name in members]
        drawn = np.array([name.startswith(SCENES) for name in members])
        scene_share = 1.0 if drawn.all() else settings["scene_share"]
        for group, share in ((drawn, scene_share), (~drawn, 1 - scene_share)):
            if group.any():
                weights[group] *= share / weights[group].sum()
        self.weights = weights / weights.sum()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """`image` uint8 3 x S x S, zero where padded; `valid` (height, width) of the image in it; `masks` bool
        K x S/2 x S/2."""
        rng = np.random.default_rng((self.seed, number))
        while True:
            indices = self.sets[rng.choice(len(self.sets), p=self.weights)]
            made = self.make(indices[rng.integers(len(indices))], rng, augment=True)
            if made is not None:
                return made

    def make(self, index: int, rng: np.random.Generator, *, augment: bool) -> dict[str, Tensor] | None:
        """The sample of one image, None if no object of it is large enough; without `augment` the whole image."""
        image, labels = self.pool.read(index)
        box = _crop(labels, rng) if augment else (0, 0, labels.shape[1], labels.shape[0])
        stretch = float(np.exp(rng.uniform(-0.2, 0.2))) if augment else 1.0
        x0, y0, width, height = box
        scale = self.size / max(width * stretch, height / stretch)
        out_w = min(max(round(width * stretch * scale / 2) * 2, 32), self.size)
        out_h = min(max(round(height / stretch * scale / 2) * 2, 32), self.size)
        flips = (augment and rng.random() < 0.5, augment and rng.random() < 0.15)
        window = slice(y0, y0 + height), slice(x0, x0 + width)
        image, labels = image[window], labels[window]
        if flips[0]:
            image, labels = image[:, ::-1], labels[:, ::-1]
        if flips[1]:
            image, labels = image[::-1], labels[::-1]
        masks = self._objects(np.ascontiguousarray(labels), (out_w // 2, out_h // 2), rng)
        if masks is None:
            return None
        shrink = out_w < width
        resized = cv2.resize(
            np.ascontiguousarray(image), (out_w, out_h), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        if augment:
            layered = _kind(self.pool.items[index]) == LAYERED
            resized = _photometric(resized, rng, LAYERED_BLACK_AND_WHITE if layered else BLACK_AND_WHITE)
        framed = np.zeros((self.size, self.size, 3), np.uint8)
        framed[:out_h, :out_w] = resized
        return {
            "image": torch.from_numpy(framed).permute(2, 0, 1).contiguous(),
            "valid": torch.tensor([out_h, out_w]),
            "masks": torch.from_numpy(masks),
        }

    def _objects(
        self, labels: NDArray[np.uint8], size: tuple[int, int], rng: np.random.Generator
    ) -> NDArray[np.bool_] | None:
        """K masks (bool, K x S/2 x S/2), larger objects more often; objects repeat where there are fewer than K."""
        counts = np.bincount(labels.ravel()).astype(float) * (size[0] * size[1] / labels.size)
        counts[0] = 0
        candidates = np.flatnonzero(counts >= MIN_PIXELS)
        if not len(candidates):
            return None
        weights = counts[candidates] ** 0.3
        chosen = rng.choice(candidates, min(self.objects, len(candidates)), replace=False, p=weights / weights.sum())
        low = self.size // 2
        masks = np.zeros((len(chosen), low, low), bool)
        shrink = size[0] < labels.shape[1]
        for place, label in enumerate(chosen):
            own = (labels == label).astype(np.uint8) * 255
            soft = cv2.resize(own, size, interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
            masks[place, : size[1], : size[0]] = soft > 127
        masks = masks[masks.sum((1, 2)) >= MIN_PIXELS // 2]
        return masks[np.arange(self.objects) % len(masks)] if len(masks) else None


def _kind(item: Item) -> str:
    """The set of an item; of drawn scenes each kind is one."""
    return f"{SCENES} {item.name.partition('-')[0]}" if item.set == SCENES else item.set


def _crop(labels: NDArray[np.uint8], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(x0, y0, width, height) in pixels: the whole image, a window that holds a pixel of some object, or one about an
    object that is 1.3 to 4 times as large as it, because small objects are otherwise never seen from near."""
    height, width = labels.shape
    numbers = np.unique(labels)
    numbers = numbers[numbers > 0]
    if rng.random() < 0.25 or not len(numbers):
        return 0, 0, width, height
    ys, xs = np.nonzero(labels == rng.choice(numbers))
    at = rng.integers(len(ys))
    if rng.random() < 0.7:
        extent = max(np.ptp(xs), np.ptp(ys)) + 1
        w = h = max(round(extent * np.exp(rng.uniform(np.log(1.3), np.log(4.0)))), 24)
    else:
        side = rng.uniform(0.4, 1.0)
        w, h = (max(round(full * min(side * np.exp(rng.uniform(-0.15, 0.15)), 1.0)), 16) for full in (width, height))
    w, h = min(w, width), min(h, height)
    x0 = int(np.clip(xs[at] - rng.uniform(0.1, 0.9) * w, 0, width - w))
    y0 = int(np.clip(ys[at] - rng.uniform(0.1, 0.9) * h, 0, height - h))
    return x0, y0, w, h


def _photometric(image: NDArray[np.uint8], rng: np.random.Generator, black_and_white: float) -> NDArray[np.uint8]:
    """Brightness, contrast, gamma, colour cast, saturation, grey, inversion, blur, noise; each only now and then, and
    black and white in a share of `black_and_white`."""
    table: NDArray[Any] = np.arange(256) / 255.0
    gamma, gain, lift = np.exp(rng.normal(0, 0.2)), np.exp(rng.normal(0, 0.2)), rng.normal(0, 0.07)
    tables = [
        (table**gamma - 0.5) * gain * np.exp(rng.normal(0, 0.06)) + 0.5 + lift + rng.normal(0, 0.03) for _ in range(3)
    ]
    image = cv2.LUT(image, (np.clip(np.stack(tables, -1), 0, 1) * 255).astype(np.uint8)[None])
    grey = 0.0 if rng.random() > 0.5 else (1.0 if rng.random() < 0.3 else rng.uniform(0, 0.8))
    if grey:
        flat = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        image = cv2.addWeighted(image, 1 - grey, flat, grey, 0)
    if rng.random() < 0.03:
        image = 255 - image
    if rng.random() < black_and_white:
        image = _two_tones(image, rng)
    if rng.random() < 0.12:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.5))
    if rng.random() < 0.2:
        noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(2, 14))
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def _two_tones(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """White where the image, or noise where it is flat, is above the mean of its surroundings, else black."""
    noise = rng.standard_normal(image.shape[:2], np.float32) * np.float32(rng.uniform(1, 12))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) + noise
    white = grey > cv2.GaussianBlur(grey, (0, 0), rng.uniform(4, 20))
    return np.repeat((white * np.uint8(255))[..., None], 3, axis=2)
