"""The packed training pool: every image and label map as encoded bytes in one file, drawn scenes among them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

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
    """Reads a packed pool; the blob is memory-mapped, so that loader processes share it. With `decoded` they share all
    its pixels, some 2 GB: beside a GPU decoding would be half of what preparing a sample takes."""

    def __init__(self, folder: Path, *, decoded: bool = False) -> None:
        self.blob = np.memmap(folder / "pool.bin", np.uint8, "r")
        stored = json.loads((folder / "pool.json").read_text())
        self.items = [
            Item(**{key: tuple(value) if isinstance(value, list) else value for key, value in item.items()})
            for item in stored
        ]
        self.decoded: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        if decoded:
            with ThreadPoolExecutor() as executor:
                self.decoded = list(executor.map(self.read, range(len(self.items))))

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image (H x W x 3, RGB) and labels (H x W, 0 = background) of one item."""
        if self.decoded:
            return self.decoded[index]
        item = self.items[index]
        image = cv2.imdecode(self.blob[slice(*item.image)], cv2.IMREAD_COLOR)
        labels = cv2.imdecode(self.blob[slice(*item.labels)], cv2.IMREAD_UNCHANGED)
        if image is None or labels is None:
            raise ValueError(
                f"The packed pool is damaged at {item.set}/{item.name}; delete it, and it is packed again."
            )
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), labels


class Packed(NamedTuple):
    """One image on its way into a pool: its set, its name, its place among the images of its set, the bytes."""

    set: str
    name: str
    place: int
    image: bytes
    labels: bytes


def pack(source: Path | None, folder: Path, config: dict[str, Any], processes: int = 1) -> None:
    """Write folder/pool.bin and folder/pool.json from the photographs of `source` and drawn scenes.

    `source` is a folder of <set>/{images,labels}, or one that was packed before: its photographs are taken and scenes
    drawn anew. None packs drawn scenes alone. An item is held out by its place in its set, so packing again gives the
    same split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items: list[dict[str, Any]] = []
    every = round(1 / config["held_out"])
    part = folder / "pool.bin.part"
    with part.open("wb") as blob, ProcessPoolExecutor(processes) as executor:
        scenes = executor.map(partial(_scene, config["scene_side"]), range(config["scenes"]), chunksize=8)
        for packed in chain(photographs(source, config), scenes):
            start = blob.tell()
            blob.write(packed.image + packed.labels)
            middle, end = start + len(packed.image), start + len(packed.image) + len(packed.labels)
            size = cv2.imdecode(np.frombuffer(packed.labels, np.uint8), cv2.IMREAD_UNCHANGED).shape[:2]
            items.append(
                {"set": packed.set, "name": packed.name, "size": size, "image": (start, middle),
                 "labels": (middle, end), "held_out": packed.place % every == every // 2}
            )  # fmt: skip
    part.rename(folder / "pool.bin")
    (folder / "pool.json").write_text(json.dumps(items))


def photographs(source: Path | None, config: dict[str, Any]) -> Iterator[Packed]:
    """What `pack` takes from `source`, in order."""
    if source is None:
        return
    if (source / "pool.json").exists():
        places: Counter[str] = Counter()
        pool = Pool(source)
        for item in pool.items:
            if item.set != SCENES and item.set not in config["leave_out"]:
                image, labels = (pool.blob[slice(*part)].tobytes() for part in (item.image, item.labels))
                yield Packed(item.set, item.name, places[item.set], image, labels)
                places[item.set] += 1
        return
    for metadata in sorted(source.glob("*/metadata.json")):
        set_folder = metadata.parent
        if set_folder.name in config["leave_out"]:
            continue
        for place, file in enumerate(sorted((set_folder / "images").iterdir())):
            labels = (set_folder / "labels" / f"{file.stem}.png").read_bytes()
            yield Packed(set_folder.name, file.stem, place, _smaller(file.read_bytes(), config["webp_quality"]), labels)


def _smaller(image: bytes, quality: int) -> bytes:
    """An encoded image as WebP of that quality, where that is smaller; 0 leaves it as it is."""
    if not quality:
        return image
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    again = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
    return min(image, again, key=len)


def _scene(side: int, place: int) -> Packed:
    height, kinds = side if place % 3 else side * 3 // 4, list(KINDS)
    scene = draw(place, (height, side), kinds[place % len(kinds)])
    image = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    labels = cv2.imencode(".png", scene.labels.astype(np.uint8))[1].tobytes()
    return Packed(SCENES, f"{scene.kind}-{place}", place, image, labels)
