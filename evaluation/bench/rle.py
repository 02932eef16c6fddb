"""Brush RLE of 12-megapixel masks, beside the functions of Label Studio's SDK."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from label_studio_sdk.converter import brush

from evaluation.bench.setup import SIZES, Bench, scene
from worker import brush_rle

SPECKS = 0.01


def measure(bench: Bench) -> dict[str, Any]:
    """`rle`: milliseconds of ours and of the SDK's, and the medians of their ratios, for a clean and a specked mask."""
    width, height = SIZES["4000x3000"]
    clean = scene(3, height, width).labels == 1
    specked = clean ^ (np.random.default_rng(0).random(clean.shape) < SPECKS)
    found: dict[str, Any] = {}
    for name, mask in (("", clean), ("_specks", specked)):
        bench.say(f"RLE: {'1 % specks' if name else 'clean mask'}")
        grey = mask.astype(np.uint8) * 255
        rle = brush_rle.encode(mask)
        assert rle == brush.mask2rle(grey)  # type: ignore[no-untyped-call]
        text = list(rle)
        ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "encode": (
                lambda mask=mask: brush_rle.encode(mask),  # type: ignore[misc]
                lambda grey=grey: brush.mask2rle(grey),  # type: ignore[misc, no-untyped-call]
            ),
            "decode": (
                lambda text=text: brush_rle.decode(text, height, width),  # type: ignore[misc]
                lambda text=text: brush.decode_rle(text),  # type: ignore[misc]
            ),
        }
        for verb, (ours, sdk) in ways.items():
            # The SDK decodes a specked mask in five seconds.
            rounds = bench.count(9, 1) if not (name and verb == "decode") else bench.count(3, 0)
            if not rounds:
                continue
            pairs = [(_time(ours), _time(sdk)) for _ in range(rounds)]
            mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            found[f"{verb}_ratio{name}"] = round(statistics.median(a / b for a, b in pairs), 4)
            found[f"{verb}_ms{name}"], found[f"{verb}_sdk_ms{name}"] = round(mine, 2), round(theirs, 2)
        found[f"bytes{name}"] = len(rle)
    return {"rle": found}


def _time(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)
