"""The packed training pool: every image and label map as encoded bytes in one file, drawn scenes among them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluation.scenes import KINDS, draw

SCENES = "scenes"


@dataclass(frozen=True)
class Item:
    """One image: its set, its name, (height, width), and where its two encodings lie in the blob."""

    set: str
    name: str
    size: tuple[int, int]
    image: tuple[int, int]
    labels: tuple[int, int]
    held_out: bool


class Pool:
    """Reads a packed pool; the blob is memory-mapped, so that loader processes share it."""

    def __init__(self, folder: Path) -> None:
        self.blob = np.memmap(folder / "pool.bin", np.uint8, "r")
        stored = json.loads((folder / "pool.json").read_text())
        self.items = [
            Item(**{key: tuple(value) if isinstance(value, list) else value for key, value in item.items()})
            for item in stored
        ]

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image (H x W x 3, RGB) and labels (H x W, 0 = background) of one item."""
        item = self.items[index]
        image = cv2.imdecode(self.blob[slice(*item.image)], cv2.IMREAD_COLOR)
        labels = cv2.imdecode(self.blob[slice(*item.labels)], cv2.IMREAD_UNCHANGED)
        if image is None or labels is None:
            raise ValueError(
                f"The packed pool is damaged at {item.set}/{item.name}; delete it, and it is packed again."
            )
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), labels


def pack(source: Path | None, folder: Path, config: dict[str, Any]) -> None:
    """Write folder/pool.bin and folder/pool.json from `source`/<set>/{images,labels} and drawn scenes.

    `source` None packs drawn scenes alone. An item is held out by its place in its set, so packing again gives the
    same split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items: list[dict[str, Any]] = []
    every = round(1 / config["held_out"])
    partial = folder / "pool.bin.part"
    with partial.open("wb") as blob:

        def add(set_name: str, name: str, size: tuple[int, int], image: bytes, labels: bytes, place: int) -> None:
            start = blob.tell()
            blob.write(image + labels)
            middle, end = start + len(image), start + len(image) + len(labels)
            held = place % every == every // 2
            items.append(
                {"set": set_name, "name": name, "size": size, "image": (start, middle), "labels": (middle, end),
                 "held_out": held}
            )  # fmt: skip

        for metadata in sorted(source.glob("*/metadata.json")) if source else []:
            set_folder = metadata.parent
            if set_folder.name in config["leave_out"]:
                continue
            for place, image_file in enumerate(sorted((set_folder / "images").iterdir())):
                label_bytes = (set_folder / "labels" / f"{image_file.stem}.png").read_bytes()
                labels = cv2.imdecode(np.frombuffer(label_bytes, np.uint8), cv2.IMREAD_UNCHANGED)
                add(set_folder.name, image_file.stem, labels.shape[:2], image_file.read_bytes(), label_bytes, place)
        side, kinds = config["scene_side"], list(KINDS)
        for place in range(config["scenes"]):
            height = side if place % 3 else side * 3 // 4
            scene = draw(place, (height, side), kinds[place % len(kinds)])
            image = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
            labels = cv2.imencode(".png", scene.labels.astype(np.uint8))[1].tobytes()
            add(SCENES, f"{scene.kind}-{place}", (height, side), image, labels, place)
    partial.rename(folder / "pool.bin")
    (folder / "pool.json").write_text(json.dumps(items))
