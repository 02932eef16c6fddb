"""Image / object pairs from folders, in two layouts.

`metadata.json` with `pairs`: {image, mask, ignore?, object?}, masks are 8-bit PNG with 255 = object.
`metadata.json` with `items`: {name}, images/NAME.jpg (or .png), labels/NAME.png: 0 = background, 1..K = objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.bool_]


class DatasetError(ValueError):
    """A data set that cannot be read; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Pair:
    """One object on one image. `name` is unique in its data set; `label` is None where the mask file is the object."""

    dataset: str
    name: str
    image: Path
    mask: Path
    label: int | None = None
    ignore: Path | None = None

    def read_image(self) -> NDArray[np.uint8]:
        """H x W x 3 RGB uint8."""
        return np.asarray(Image.open(self.image).convert("RGB"))

    def read_mask(self) -> Mask:
        """H x W, True on the object. Raises DatasetError for an empty mask."""
        values = np.asarray(Image.open(self.mask))
        values = values[..., 0] if values.ndim == 3 else values
        mask: Mask = values > 127 if self.label is None else values == self.label
        if not mask.any():
            raise DatasetError(f"The mask {self.mask} holds no object. Remove the pair from metadata.json.")
        return mask

    def read_ignore(self) -> Mask | None:
        """H x W, True on pixels that are left out of every measure, or None."""
        if self.ignore is None:
            return None
        values = np.asarray(Image.open(self.ignore))
        return np.asarray((values[..., 0] if values.ndim == 3 else values) > 127)


def read_pairs(folder: Path, *, per_image: int = 3, seed: int = 0) -> list[Pair]:
    """All pairs of a folder, in the order of its metadata.json.

    `per_image`: at most this many objects of a label map, chosen at random by `seed`; `pairs` are taken as they are.
    Raises DatasetError.
    """
    path = folder / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
    except OSError as error:
        raise DatasetError(
            f"{folder} has no readable metadata.json. Give a folder with images, masks and one."
        ) from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path} is not JSON ({error}).") from error
    name = str(metadata.get("name") or folder.name)
    if "pairs" in metadata:
        return [_pair(folder, name, number, entry) for number, entry in enumerate(metadata["pairs"])]
    if "items" in metadata:
        return _labelled(folder, name, metadata["items"], per_image, np.random.default_rng(seed))
    raise DatasetError(f"{path} has neither `pairs` nor `items`.")


def _pair(folder: Path, dataset: str, number: int, entry: dict[str, str]) -> Pair:
    try:
        image, mask = folder / entry["image"], folder / entry["mask"]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"Pair {number} of {folder / 'metadata.json'} needs `image` and `mask`.") from error
    for path in (image, mask):
        if not path.is_file():
            raise DatasetError(f"Pair {number} of {folder / 'metadata.json'} names {path}, which does not exist.")
    ignore = folder / entry["ignore"] if entry.get("ignore") else None
    return Pair(dataset, f"{number:04d}-{mask.stem}", image, mask, None, ignore)


def _labelled(
    folder: Path, dataset: str, items: Sequence[dict[str, str]], per_image: int, rng: np.random.Generator
) -> list[Pair]:
    pairs = []
    for item in items:
        image = next(
            (p for ext in ("jpg", "png") if (p := folder / "images" / f"{item['name']}.{ext}").is_file()), None
        )
        labels = folder / "labels" / f"{item['name']}.png"
        if image is None or not labels.is_file():
            raise DatasetError(f"{folder} lacks the image or the labels of {item['name']}.")
        numbers = [int(n) for n in np.unique(np.asarray(Image.open(labels))) if n]
        chosen = sorted(rng.choice(numbers, min(per_image, len(numbers)), replace=False)) if numbers else []
        pairs += [Pair(dataset, f"{item['name']}-{int(label)}", image, labels, int(label)) for label in chosen]
    return pairs


def subset(pairs: list[Pair], limit: int | None) -> list[Pair]:
    """Every n-th pair so that at most `limit` remain, spread over the list; all of them for None."""
    if limit is None or len(pairs) <= limit:
        return pairs
    return [pairs[int(position)] for position in np.linspace(0, len(pairs) - 1, limit).round()]
