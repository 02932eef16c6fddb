"""What every part of the benchmark needs: images, weights, sizes, and how numbers are summed up."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from evaluation.scenes import Scene, draw
from worker.backbones import BACKBONES, Backbone, build
from worker.contract import RuntimeOptions
from worker.embedding_folder import EmbeddingFolder
from worker.embeddings import EmbeddingCache
from worker.encode import Embedding, encode
from worker.images.pixels import decode_image

#: Sizes of images that clicks are timed on, (width, height).
SIZES = {"1024x1024": (1024, 1024), "4000x3000": (4000, 3000)}
JPEG_QUALITY = 90
EMBEDDINGS_BYTES = 1 << 30


@lru_cache(maxsize=32)
def scene(seed: int, height: int, width: int) -> Scene:
    """A drawn scene; one of 12 megapixels takes seconds, and several parts ask for the same."""
    return draw(seed, (height, width))


@dataclass(frozen=True)
class Bench:
    """One run. `folder`: where images and random weights are written; `label_config`: of the project that clicks.

    `sizes`: of `SIZES`, those that clicks are timed on. `note`: keeps the figures that a part has so far, by the part's
    name, for one that takes long enough to be cut off. `running`: what lasts until the end of the run; `servers`: those
    of `server.shared`.
    """

    backbones: tuple[str, ...]
    sizes: tuple[str, ...]
    device: str
    quick: bool
    folder: Path
    label_config: str
    say: Callable[[str], None]
    note: Callable[[str, dict[str, Any]], None]
    running: ExitStack = field(default_factory=ExitStack)
    servers: dict[tuple[str, bool], Any] = field(default_factory=dict)

    def count(self, full: int, quick: int) -> int:
        """How often something is measured."""
        return quick if self.quick else full

    def image(self, name: str, seed: int, width: int, height: int) -> Path:
        """A drawn scene as a JPEG file; no two names have the same bytes."""
        path = self.folder / f"{name}.jpg"
        if not path.exists():
            pixels = scene(seed, height, width).image.copy()
            # The name in the pixels, in squares that JPEG keeps: caches go by content.
            digest = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8).reshape(4, 8)
            squares = np.kron(digest, np.ones((8, 8), np.uint8))[:height, :width, None]
            pixels[: squares.shape[0], : squares.shape[1]] = squares
            Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
        return path

    def checkpoint(self, backbone: str) -> Path | None:
        """Weights of a backbone: those that ship, else random ones of the real architecture, written once."""
        if BACKBONES[backbone].checkpoint is None:
            return None
        path = self.folder / f"{backbone}-random.pth"
        if not path.exists():
            self.say(f"writing random weights of {backbone}")
            torch.save(build(backbone, device="cpu", random_weights=True).sam.state_dict(), path)
        return path

    def build(self, backbone: str) -> Backbone:
        """The same model that the servers run."""
        return build(backbone, checkpoint=self.checkpoint(backbone), device=self.device, precision="auto")

    def runtime_options(self, backbone: str) -> RuntimeOptions:
        """For job functions that are called in this process."""
        return RuntimeOptions(
            data_dir=self.folder / "data",
            backbone=backbone,
            checkpoint=self.checkpoint(backbone),
            device=self.device,
            local_roots=(self.folder,),
        )

    def encoded(self, backbone: Backbone, image: Path) -> Embedding:
        """The embedding of an image, kept where `server.shared` servers find it too: who measures clicks should not
        wait for three encodes of a large model."""
        cache, data = EmbeddingCache(0, folder=EmbeddingFolder(self.embeddings, EMBEDDINGS_BYTES)), image.read_bytes()
        options = self.runtime_options(backbone.name)
        key = cache.key(data, backbone)
        return cache.get_or_encode(key, backbone.device, lambda: encode(backbone, decode_image(data, options)))

    @property
    def embeddings(self) -> Path:
        """The folder of `encoded`."""
        return self.folder / "embeddings"

    def environment(self, backbone: str, **settings: str) -> dict[str, str]:
        """Of a server or worker process; nothing of the caller's own settings gets in."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BALD_SAM_", "LABEL_STUDIO_"))}
        checkpoint = self.checkpoint(backbone)
        own = {"DATA_DIR": str(self.folder / "data"), "LOCAL_ROOTS": str(self.folder), "BACKBONE": backbone}
        own |= {"DEVICE": self.device, "CHECKPOINT": str(checkpoint or ""), "PREFETCH": "0", **settings}
        return clean | {f"BALD_SAM_{name}": value for name, value in own.items()}


def published(backbone: Backbone) -> Sam:
    """The weights of a ViT backbone in the published code, on its device: ours has another attention in its encoder."""
    sam = sam_model_registry[backbone.name]()
    # As published in memory too: ours has the channels last in some.
    sam.load_state_dict({name: value.contiguous() for name, value in backbone.sam.state_dict().items()}, assign=True)
    return sam.to(backbone.device).eval()  # its constants are in no state dict


def summary(milliseconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 of some times, and how many there are."""
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    return {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2), "n": len(milliseconds)}


def synchronise(backbone: Backbone) -> None:
    """Wait for the device: a time without this is that of starting the work."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def machine(device: str) -> dict[str, str]:
    """What a run was measured on, and when."""
    if device.startswith("cuda"):
        what = torch.cuda.get_device_name(device)
    else:
        count = torch.get_num_threads()
        what = f"{count} {'thread' if count == 1 else 'threads'} of {_processor()}"
    return {"device": what, "date": date.today().isoformat(), "torch": torch.__version__}


def _processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
