"""Features of a frozen ImageNet network for every photograph of the pool: what `tiny` learns to predict on the side.

The teacher's stride-16 activations are projected on their first principal components, each divided by the square root
of its standard deviation, which keeps the strong ones from drowning the rest. They are computed once, memory-mapped.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tiny.pool import SCENES, Pool

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def precompute(pool: Pool, weights: Path, folder: Path, channels: int, long_side: int, device: torch.device) -> None:
    """Write folder/teacher.bin (float16) and folder/teacher.json: per item (offset in values, h, w), channels last."""
    spec = importlib.util.spec_from_file_location("teacher_network", weights.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.load(weights).to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(index: int) -> Tensor:
        image, _ = pool.read(index)
        scale = long_side / max(image.shape[:2])
        height, width = (max(round(side * scale / 16), 1) * 16 for side in image.shape[:2])
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        x = torch.from_numpy(resized).permute(2, 0, 1)[None].to(device).float() / 255
        x = (x - torch.tensor(MEAN, device=device).view(3, 1, 1)) / torch.tensor(STD, device=device).view(3, 1, 1)
        return network(x.contiguous(memory_format=torch.channels_last))[2][0].permute(1, 2, 0)  # h x w x 1024

    rng = np.random.default_rng(0)
    photographs = [index for index, item in enumerate(pool.items) if item.set != SCENES]
    some = rng.permutation(photographs)[:200]
    rows = torch.cat([features(int(i)).flatten(0, 1) for i in some]).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    project = vectors / values.clamp_min(1e-12) ** 0.25
    spread = ((rows - mean) @ project).std()
    mean, project = mean.float(), (project / spread).float()
    places: list[tuple[int, int, int] | None] = []  # None: a drawn scene, which the teacher has nothing to say about
    offset = 0
    with (folder / "teacher.bin.part").open("wb") as out:
        for index, item in enumerate(pool.items):
            if item.set == SCENES:
                places.append(None)
                continue
            projected = ((features(index) - mean) @ project).cpu().numpy().astype(np.float16)
            places.append((offset, *projected.shape[:2]))
            out.write(projected.tobytes())
            offset += projected.size
            if index % 400 == 0:
                print(f"teacher: {index} of {len(pool.items)} images", file=sys.stderr, flush=True)
    (folder / "teacher.bin.part").rename(folder / "teacher.bin")
    (folder / "teacher.json").write_text(json.dumps({"channels": channels, "places": places}))


class TeacherFeatures:
    """Reads what `precompute` wrote, resampled to a training crop."""

    def __init__(self, folder: Path) -> None:
        stored = json.loads((folder / "teacher.json").read_text())
        self.channels, self.places = stored["channels"], stored["places"]
        self.values = np.memmap(folder / "teacher.bin", np.float16, "r")

    def crop(self, index: int, to_source: NDArray[np.float64], side: int) -> tuple[Tensor, Tensor]:
        """The features under a crop: C x side/16 x side/16 float16, and where they are known (bool, same h x w).

        `to_source` (2 x 3) maps crop coordinates (x, y) in pixels to the image's, scaled to 0..1.
        """
        cells = side // 16
        if self.places[index] is None:
            return torch.zeros(self.channels, cells, cells).half(), torch.zeros(cells, cells, dtype=torch.bool)
        offset, height, width = self.places[index]
        size = height * width * self.channels
        stored = np.array(self.values[offset : offset + size]).reshape(height, width, self.channels)
        centres = (np.arange(cells) + 0.5) * 16
        x, y = np.meshgrid(centres, centres)
        grid = np.stack([x, y, np.ones_like(x)], -1) @ to_source.T * 2 - 1
        known = (np.abs(grid) < 1).all(-1)
        sampled = F.grid_sample(
            torch.from_numpy(stored).float().permute(2, 0, 1)[None],
            torch.from_numpy(grid).float()[None],
            padding_mode="border",
            align_corners=False,
        )
        return sampled[0].half(), torch.from_numpy(known)
