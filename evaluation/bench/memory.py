"""Memory of the server over thousands of clicks on hundreds of images, its caches full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evaluation.bench.server import serving
from evaluation.bench.setup import Bench
from worker.encode import Embedding, encode

WIDTH, HEIGHT, CLICKS = 512, 384, 10
CACHE_MB = 64
POINTS = [(50.0, 50.0, True), (20.0, 30.0, False), (62.0, 41.0, True), (80.0, 75.0, False), (35.0, 60.0, True)]


def measure(bench: Bench) -> dict[str, Any]:
    """`memory`: megabytes by number of images, and the slope of a line through them once the caches are full.

    The caches have so little room that they are full after a fraction of the images. Linux only: empty elsewhere.
    """
    if not Path("/proc/self/statm").exists():
        bench.say("memory is measured on Linux only")
        return {}
    name = bench.backbones[0]
    images, clicks, cache_mb = bench.count(500, 3), bench.count(CLICKS, 2), bench.count(CACHE_MB, 4)
    each = _bytes_of_an_image(bench, name)
    warm_up = max(int(1.5 * cache_mb * 2**20 / each), images // 5)
    warm_up = min(warm_up, images // 2)
    curve: list[tuple[int, float]] = []
    with serving(bench, name, CACHE_MB=str(cache_mb)) as server, server.page() as page:
        curve.append((0, _resident_mb(server.pid)))
        for number in range(1, images + 1):
            image = bench.image(f"memory-{number}", number % 7, WIDTH, HEIGHT)
            for count in range(clicks):
                given = POINTS[: 1 + count % len(POINTS)]
                page.click(image, number, f"m{number}-{count // len(POINTS)}", given)
            image.unlink()
            if number % max(1, images // 100) == 0:
                curve.append((number, _resident_mb(server.pid)))
            if number % 50 == 0:
                bench.say(f"memory: {number} of {images} images, {curve[-1][1]:.0f} MB")
    steady = np.array([point for point in curve if point[0] >= warm_up])
    slope = float(np.polyfit(steady[:, 0], steady[:, 1], 1)[0]) * 100
    return {
        "memory": {
            "backbone": name,
            "images": images,
            "clicks": images * clicks,
            "warm_up_images": warm_up,
            "cache_mb": cache_mb,
            "mb_per_cached_image": round(each / 2**20, 3),
            "resident_mb": round(curve[-1][1], 1),
            "slope_mb_per_100_images": round(slope, 3),
            "curve": [(number, round(mb, 1)) for number, mb in curve],
        }
    }


def _bytes_of_an_image(bench: Bench, name: str) -> int:
    embedding: Embedding = encode(bench.build(name), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return embedding.size


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20
