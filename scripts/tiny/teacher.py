"""Features of a frozen ImageNet network for what `tiny` is shown: what it learns to predict on the side.

The teacher sees the same pixels. Its stride-16 activations are projected on their first principal components, each
divided by the square root of its standard deviation, which keeps the strong ones from drowning the rest.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny.pool import SCENES, Pool

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = 200  # that the components are taken from


class Teacher:
    """`network` (its loader lies beside its weights), and the affine map of its 1024 features to C."""

    def __init__(self, weights: Path, mean: Tensor, project: Tensor, device: torch.device) -> None:
        self.network, self.mean, self.project = _load(weights, device), mean.to(device), project.to(device)

    @property
    def channels(self) -> int:
        """How many features there are of a cell."""
        return self.project.shape[1]

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> Teacher:
        """The teacher that `prepare` wrote of."""
        kept = load_file(folder / "teacher.safetensors")
        weights = Path(bytes(kept["weights"].tolist()).decode())
        return cls(weights, kept["mean"], kept["project"], device)

    @torch.no_grad()
    def features(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 B x 3 x S x S, zero beyond its `valid` (height, width), to float32 B x C x S/16 x S/16 and which of
        the cells lie in the image, bool B x S/16 x S/16."""
        with torch.autocast(image.device.type, torch.bfloat16):
            cells = _cells(self.network, image)
        centres = (torch.arange(cells.shape[1], device=image.device) + 0.5) * 16
        inside = (centres[None, :, None] < valid[:, :1, None]) & (centres[None, None] < valid[:, 1:, None])
        return ((cells - self.mean) @ self.project).permute(0, 3, 1, 2), inside


@torch.inference_mode()
def prepare(pool: Pool, weights: Path, folder: Path, channels: int, device: torch.device) -> None:
    """Find the components on some photographs of the pool and write folder/teacher.safetensors."""
    network = _load(weights, device)
    photographs = [index for index, item in enumerate(pool.items) if item.set != SCENES]
    rows = []
    for index in np.random.default_rng(0).permutation(photographs)[:PHOTOGRAPHS]:
        image = torch.from_numpy(pool.read(int(index))[0]).permute(2, 0, 1)[None]
        height, width = (side // 16 * 16 for side in image.shape[2:])
        rows.append(_cells(network, image[..., :height, :width].to(device)).flatten(0, 2))
    seen = torch.cat(rows).double()
    mean = seen.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(seen.T))
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    project = vectors / values.clamp_min(1e-12) ** 0.25
    project /= ((seen - mean) @ project).std()
    name = torch.tensor(list(str(weights.resolve()).encode()), dtype=torch.uint8)
    kept = {"mean": mean.float(), "project": project.float(), "weights": name}
    save_file({key: value.cpu().contiguous() for key, value in kept.items()}, folder / "teacher.safetensors")


def _load(weights: Path, device: torch.device) -> Any:
    spec = importlib.util.spec_from_file_location("teacher_network", weights.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(weights).to(device, memory_format=torch.channels_last)


def _cells(network: Any, image: Tensor) -> Tensor:
    """uint8 B x 3 x H x W to float32 B x H/16 x W/16 x 1024."""
    mean, std = (torch.tensor(of, device=image.device).view(3, 1, 1) for of in (MEAN, STD))
    x = (image.float() / 255 - mean) / std
    return network(x.contiguous(memory_format=torch.channels_last))[2].permute(0, 2, 3, 1).float()  # type: ignore[no-any-return]
