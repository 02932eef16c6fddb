"""Drawn scenes with exact masks: training material for `tiny`, images for tests and for the demo.

Everything is numpy and OpenCV, and a function of the seed alone. Kinds:
`objects` (textured shapes that occlude each other), `thin` (branches and cables), `holes` (rings and frames),
`parts` (groups of separate panels, seen aslant, each group one object), `bands` (layered sections with faults),
`speckle` (dark lesions in multiplicative noise), `cells` (many alike round things, touching).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # H x W x 3, RGB
Mask = NDArray[np.bool_]  # H x W
Field = NDArray[np.float32]  # H x W

MIN_AREA = 0.002  # of the image: smaller objects become background


@dataclass(frozen=True)
class Scene:
    """`image` uint8 H x W x 3 RGB; `labels` uint16 H x W, 0 = background, 1..K = objects, contiguous; its `kind`."""

    image: Image
    labels: NDArray[np.uint16]
    kind: str


def draw(seed: int, size: tuple[int, int] = (320, 320), kind: str | None = None) -> Scene:
    """The scene of this seed, at least one object in it.

    `size` is (height, width) in pixels; `kind` one of `KINDS`, or None to let the seed choose.
    Raises ValueError for another kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"There is no kind of scene called {kind!r}; choose one of {', '.join(KINDS)}.")
    rng = np.random.default_rng((seed, 20))
    chosen = kind or str(rng.choice(list(KINDS)))
    while True:
        image, drawn = KINDS[chosen](rng, *size)
        labels = _contiguous(drawn)
        if labels.any():
            return Scene(np.clip(image, 0, 255).astype(np.uint8), labels, chosen)


def _contiguous(labels: NDArray[np.int32]) -> NDArray[np.uint16]:
    """Drop objects under `MIN_AREA` and number the rest from 1."""
    counts = np.bincount(labels.ravel())
    keep = counts >= MIN_AREA * labels.size
    keep[0] = False
    numbers = np.zeros(len(counts), np.uint16)
    numbers[keep] = np.arange(1, keep.sum() + 1)
    return numbers[labels]


# -- noise, colour, texture -----------------------------------------------------------------------------------------


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 3) -> Field:
    """Value noise with mean 0 and standard deviation 1; `cell` is the size of its largest grain in pixels."""
    field = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step = max(cell / 2**octave, 1.0)
        grid = rng.standard_normal((max(int(height / step), 1) + 2, max(int(width / step), 1) + 2)).astype(np.float32)
        field += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), np.float32)


def _colour(rng: np.random.Generator) -> Field:
    """A colour that could be a thing's: hue free, saturation mostly moderate. Float32, 3 values in 0..255."""
    hsv = np.array([[[rng.integers(180), 255 * rng.beta(1.5, 2), 255 * rng.beta(3, 2)]]], np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0], np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> Field:
    """An opaque textured surface, float32 H x W x 3 in about 0..255: two colours mixed by a pattern, and shading."""
    first, second = _colour(rng), _colour(rng)
    if rng.random() < 0.6:  # most things are of one colour
        second = first + rng.normal(0, 22, 3).astype(np.float32)
    yy, xx = np.mgrid[:height, :width].astype(np.float32)
    pattern = rng.integers(5)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 40)
    wave = (xx * np.cos(angle) + yy * np.sin(angle)) / period
    if pattern == 0:
        mix = _smooth_noise(rng, height, width, rng.uniform(10, 80)) * 0.3 + 0.5
    elif pattern == 1:
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * wave + _smooth_noise(rng, height, width, 60) * rng.uniform(0, 2))
    elif pattern == 2:
        across = (-xx * np.sin(angle) + yy * np.cos(angle)) / period
        mix = ((np.floor(wave) + np.floor(across)) % 2).astype(np.float32)
    elif pattern == 3:
        mix = (_smooth_noise(rng, height, width, rng.uniform(4, 25), 1) > rng.uniform(-0.5, 1.5)).astype(np.float32)
    else:
        mix = np.full((height, width), 0.5, np.float32) + _smooth_noise(rng, height, width, 2, 1) * 0.1
    surface = first + (second - first) * np.clip(mix, 0, 1)[..., None]
    light = np.cos(rng.uniform(0, 2 * np.pi)) * (xx / width - 0.5) + np.sin(rng.uniform(0, 2 * np.pi)) * (
        yy / height - 0.5
    )
    return np.asarray(surface * (1 + rng.uniform(0, 0.6) * light)[..., None], np.float32)


def _finish(rng: np.random.Generator, image: Field) -> Field:
    """What a camera adds: a little blur, noise."""
    if rng.random() < 0.6:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.3)).astype(np.float32)
    return image + rng.normal(0, rng.uniform(0, 8), image.shape).astype(np.float32)


# -- shapes ---------------------------------------------------------------------------------------------------------


def _fill(height: int, width: int, points: NDArray[np.float64]) -> Mask:
    """The polygon through `points` (N x 2, (x, y) in pixels), filled."""
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return canvas.astype(bool)


def _outline(rng: np.random.Generator, height: int, width: int, radius: float, shapes: int = 4) -> NDArray[np.float64]:
    """A closed outline (N x 2, (x, y)) at random: one of the first `shapes` of ellipse, blob, polygon, rectangle."""
    centre = np.array([rng.uniform(0.08, 0.92) * width, rng.uniform(0.08, 0.92) * height])
    shape = rng.integers(shapes)
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    if shape == 0:
        distance: NDArray[np.float64] = np.ones(72)
    elif shape == 1:
        distance = 1 + sum(rng.normal(0, 0.35 / k) * np.cos(k * angles + rng.uniform(0, 6.3)) for k in range(2, 7))
        distance = np.maximum(distance, 0.15)
    elif shape == 2:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        distance = rng.uniform(0.5, 1.2, len(angles))
    else:
        angles = np.array([0.25, 0.75, 1.25, 1.75]) * np.pi
        distance = np.full(4, 1.3)
    points = distance[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    points[:, 1] *= rng.uniform(0.3, 1)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.asarray(centre + radius * points @ rotation.T)


def _paste(rng: np.random.Generator, image: Field, labels: NDArray[np.int32], mask: Mask, number: int) -> None:
    """Put a textured object on top, with a cast shadow now and then; `image` and `labels` change in place."""
    height, width = mask.shape
    if rng.random() < 0.35:
        shift = np.array([[1, 0, rng.uniform(-10, 10)], [0, 1, rng.uniform(2, 12)]], np.float32)
        shadow = cv2.GaussianBlur(cv2.warpAffine(mask.astype(np.float32), shift, (width, height)), (0, 0), 4)
        image *= 1 - 0.5 * shadow[..., None]
    surface = _texture(rng, height, width)
    if rng.random() < 0.4:  # rounded: darker towards the border
        inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
        surface *= (0.6 + 0.4 * np.minimum(inside / (inside.max() + 1e-6) * 2, 1))[..., None]
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(0.5, 1.2))[..., None]
    image *= 1 - np.asarray(soft, np.float32)
    image += soft * surface
    labels[mask] = number


# -- kinds ----------------------------------------------------------------------------------------------------------

Drawn = tuple[Field, NDArray[np.int32]]


def _ground(rng: np.random.Generator, height: int, width: int) -> Drawn:
    return _texture(rng, height, width), np.zeros((height, width), np.int32)


def _draw_objects(rng: np.random.Generator, height: int, width: int) -> Drawn:
    image, labels = _ground(rng, height, width)
    for number in range(1, rng.integers(3, 12)):
        radius = rng.uniform(0.05, 0.35) * min(height, width)
        _paste(rng, image, labels, _fill(height, width, _outline(rng, height, width, radius)), number)
    return _finish(rng, image), labels


def _draw_thin(rng: np.random.Generator, height: int, width: int) -> Drawn:
    image, labels = _ground(rng, height, width)
    for number in range(1, rng.integers(2, 5)):
        canvas = np.zeros((height, width), np.uint8)
        tips = [(rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 2 * np.pi), rng.uniform(4, 14))]
        for _ in range(int(rng.integers(1, 7))):  # a stem, then branches from it
            x, y, heading, thick = tips[rng.integers(len(tips))]
            heading += rng.normal(0, 0.8)
            for _ in range(int(rng.integers(8, 30))):
                heading += rng.normal(0, 0.18)
                ahead = (x + 9 * np.cos(heading), y + 9 * np.sin(heading))
                start, end = (round(x), round(y)), (round(ahead[0]), round(ahead[1]))
                cv2.line(canvas, start, end, 1, max(round(thick), 2), cv2.LINE_8)
                (x, y), thick = ahead, max(thick * 0.97, 2.0)
                tips.append((x, y, heading, thick * 0.7))
        _paste(rng, image, labels, canvas.astype(bool), number)
    return _finish(rng, image), labels


def _draw_holes(rng: np.random.Generator, height: int, width: int) -> Drawn:
    image, labels = _ground(rng, height, width)
    for number in range(1, rng.integers(2, 6)):
        outline = _outline(rng, height, width, rng.uniform(0.12, 0.38) * min(height, width))
        mask = _fill(height, width, outline)
        centre = outline.mean(0)
        if rng.random() < 0.6:
            mask &= ~_fill(height, width, centre + (outline - centre) * rng.uniform(0.3, 0.8))
        else:
            for _ in range(int(rng.integers(2, 6))):
                at = outline[rng.integers(len(outline))]
                hole = centre + (at - centre) * rng.uniform(0.1, 0.6)
                mask &= ~_fill(height, width, hole + (outline - centre) * rng.uniform(0.08, 0.25))
        _paste(rng, image, labels, mask, number)
    return _finish(rng, image), labels


def _draw_parts(rng: np.random.Generator, height: int, width: int) -> Drawn:
    """Rows of alike panels on roofs and ground: one group is one object, however many gaps it has."""
    image, labels = _ground(rng, height, width)
    for _ in range(int(rng.integers(1, 5))):  # roofs: things that are not asked for
        surface = _fill(height, width, _outline(rng, height, width, rng.uniform(0.1, 0.3) * min(height, width)))
        _paste(rng, image, labels, surface, 0)
    tone = _colour(rng) * rng.uniform(0.3, 1)  # the groups look alike
    for number in range(1, rng.integers(2, 6)):
        columns, rows = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        gap_x, gap_y = rng.uniform(0.03, 0.35), rng.uniform(0.03, 0.6)
        extent = rng.uniform(0.12, 0.4) * min(height, width)
        turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.4, 1)
        basis = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn) * squeeze, np.cos(turn) * squeeze]])
        corner = np.array([rng.uniform(0.02, 0.75) * width, rng.uniform(0.05, 0.75) * height])
        cell = extent / max(columns, rows)
        mask = np.zeros((height, width), bool)
        for column in range(columns):
            for row in range(rows):
                if rng.random() < 0.06:
                    continue
                square = np.array([[0, 0], [1 - gap_x, 0], [1 - gap_x, 1 - gap_y], [0, 1 - gap_y]])
                mask |= _fill(height, width, corner + cell * (square + np.array([column, row])) @ basis)
        mask &= labels == 0
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.6)[..., None]
        panel = tone + _smooth_noise(rng, height, width, 12)[..., None] * 8 + rng.normal(0, 6, 3)
        image = np.asarray(image * (1 - soft) + soft * panel, np.float32)
        labels[mask] = number
    return _finish(rng, image), labels


def _draw_bands(rng: np.random.Generator, height: int, width: int) -> Drawn:
    """A section through layers: each facies has its own frequency, contrast and chaos; borders undulate and break."""
    yy, xx = np.mgrid[:height, :width].astype(np.float32)
    depth = yy + _smooth_noise(rng, height, width, width * rng.uniform(0.3, 1.2), 2) * height * rng.uniform(0.01, 0.08)
    depth += (xx - width / 2) * rng.uniform(-0.25, 0.25)
    for _ in range(int(rng.integers(0, 4))):
        line = (xx - rng.uniform(0, width)) + (yy - height / 2) * rng.uniform(-0.6, 0.6)
        depth += (line > 0) * rng.uniform(-0.08, 0.08) * height
    count = int(rng.integers(3, 8))
    borders = np.sort(rng.uniform(depth.min(), depth.max(), count - 1))
    labels = np.ones((height, width), np.int32)
    for border in borders:  # neighbouring borders undulate each on their own, and may pinch a layer out
        own = _smooth_noise(rng, height, width, width * rng.uniform(0.2, 0.8), 2)[height // 2]
        labels += depth + own * height * rng.uniform(0, 0.03) > border
    if rng.random() < 0.35:  # a dome or channel cuts through
        labels[_fill(height, width, _outline(rng, height, width, rng.uniform(0.12, 0.3) * height))] = count + 1
    section = np.zeros((height, width), np.float32)
    for number in range(1, count + 2):
        inside = labels == number
        if inside.any():
            warp = _smooth_noise(rng, height, width, rng.uniform(20, 90), 2) * rng.choice([0.15, 0.5, 2.0])
            bent = (depth + (xx - width / 2) * rng.normal(0, 0.1)) / rng.uniform(4, 22)
            signal = np.sin(2 * np.pi * bent + warp) * (0.7 + 0.4 * _smooth_noise(rng, height, width, 60, 2))
            signal += _smooth_noise(rng, height, width, rng.uniform(2, 8), 2) * rng.uniform(0.1, 0.9)
            section[inside] = (signal * rng.uniform(0.15, 1) + rng.normal(0, 0.15))[inside]
    blurred = cv2.GaussianBlur(section, (0, 0), 0.7) + rng.normal(0, 0.08, section.shape)
    grey = np.clip(0.5 + 0.35 * blurred, 0, 1)[..., None].astype(np.float32)
    if rng.random() < 0.25:  # red-white-blue, as interpreters like it
        image = 255 * np.concatenate(
            [np.minimum(2 * grey, 1), 1 - np.abs(2 * grey - 1), np.minimum(2 - 2 * grey, 1)], 2
        )
    else:
        image = 255 * np.repeat(grey, 3, 2)
    return np.asarray(image, np.float32), labels


def _draw_speckle(rng: np.random.Generator, height: int, width: int) -> Drawn:
    """A B-mode-like picture: layered echoes, multiplicative speckle, dark lesions with fuzzy borders and shadows."""
    yy, _ = np.mgrid[:height, :width].astype(np.float32)
    layers = np.sin(yy / height * rng.uniform(4, 16) + _smooth_noise(rng, height, width, width / 2, 2) * 0.8)
    echo = 0.45 + 0.18 * layers + 0.1 * _smooth_noise(rng, height, width, 40)
    labels = np.zeros((height, width), np.int32)
    for number in range(1, rng.integers(2, 4)):
        mask = _fill(height, width, _outline(rng, height, width, rng.uniform(0.07, 0.28) * min(height, width), 2))
        mask &= labels == 0
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(1, 4))
        echo = echo * (1 - soft * rng.uniform(0.45, 0.9))
        if rng.random() < 0.4 and mask.any():  # shadow or enhancement below
            below = np.maximum.accumulate(mask, axis=0) & ~mask
            echo *= 1 + rng.uniform(-0.5, 0.4) * cv2.GaussianBlur(below.astype(np.float32), (0, 0), 6)
        labels[mask] = number
    real, imaginary = rng.standard_normal((2, height, width)).astype(np.float32)
    grain = (rng.uniform(0.8, 2.5), rng.uniform(0.5, 1.2))
    speckle = np.hypot(cv2.GaussianBlur(real, (0, 0), grain[0], sigmaY=grain[1]),
                       cv2.GaussianBlur(imaginary, (0, 0), grain[0], sigmaY=grain[1]))  # fmt: skip
    speckle /= speckle.mean()
    bright = np.clip(echo, 0.02, 1) * speckle ** rng.uniform(0.3, 0.9)
    image = 255 * np.clip(bright, 0, 1.2)[..., None] ** rng.uniform(0.6, 1.1) * np.ones(3)
    return np.asarray(image * (1 - 0.4 * (yy / height)[..., None] * rng.random()), np.float32), labels


def _draw_cells(rng: np.random.Generator, height: int, width: int) -> Drawn:
    """Many alike round things, bright on dark or dark on bright, some touching."""
    ground, thing = _colour(rng), _colour(rng)
    ground *= rng.choice([0.2, 0.6, 1.0])
    image = ground + _smooth_noise(rng, height, width, 40)[..., None] * 8 + np.zeros((height, width, 3), np.float32)
    labels = np.zeros((height, width), np.int32)
    radius = rng.uniform(0.03, 0.11) * min(height, width)
    for number in range(1, rng.integers(6, 50)):
        mask = _fill(height, width, _outline(rng, height, width, radius * rng.uniform(0.7, 1.4), 2))
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(0.6, 1.6))[..., None]
        body = thing * rng.uniform(0.75, 1.25) + _smooth_noise(rng, height, width, 8, 2)[..., None] * rng.uniform(2, 14)
        image = np.asarray(image * (1 - soft) + soft * body, np.float32)
        labels[mask] = number
    return _finish(rng, np.asarray(image, np.float32)), labels


KINDS: dict[str, Callable[[np.random.Generator, int, int], Drawn]] = {
    "objects": _draw_objects,
    "thin": _draw_thin,
    "holes": _draw_holes,
    "parts": _draw_parts,
    "bands": _draw_bands,
    "speckle": _draw_speckle,
    "cells": _draw_cells,
}
