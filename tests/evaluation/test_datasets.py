from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import datasets


def folder_of_pairs(root: Path, *, ignore: bool = False) -> Path:
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "a.png")
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 1:3] = 255
    Image.fromarray(mask).save(root / "m.png")
    pair = {"image": "a.png", "mask": "m.png"} | ({"ignore": "m.png"} if ignore else {})
    (root / "metadata.json").write_text(json.dumps({"name": "set", "pairs": [pair, pair]}))
    return root


def test_pairs(tmp_path: Path) -> None:
    pairs = datasets.read_pairs(folder_of_pairs(tmp_path, ignore=True))
    assert len({pair.name for pair in pairs}) == 2
    assert pairs[0].dataset == "set" and pairs[0].image == pairs[1].image
    assert pairs[0].read_image().shape == (4, 6, 3)
    assert pairs[0].read_mask().sum() == 4
    ignore = pairs[0].read_ignore()
    assert ignore is not None and ignore.sum() == 4


def test_label_maps(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    labels = np.zeros((8, 8), np.uint8)
    for number in range(1, 6):
        labels[number] = number
    Image.fromarray(labels).save(tmp_path / "labels" / "x.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "x.jpg")
    (tmp_path / "metadata.json").write_text(json.dumps({"name": "train", "items": [{"name": "x"}]}))
    pairs = datasets.read_pairs(tmp_path, per_image=3)
    assert len(pairs) == 3
    assert all(pair.read_mask().sum() == 8 for pair in pairs)
    assert pairs == datasets.read_pairs(tmp_path, per_image=3)
    assert len(datasets.read_pairs(tmp_path, per_image=10)) == 5


def test_subset_is_spread(tmp_path: Path) -> None:
    pairs = datasets.read_pairs(folder_of_pairs(tmp_path)) * 5
    assert len(datasets.subset(pairs, 4)) == 4
    assert datasets.subset(pairs, None) == pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no readable metadata"),
        ("{", "not JSON"),
        ("{}", "neither"),
        ('{"pairs": [{"image": "a.png"}]}', "needs `image` and `mask`"),
        ('{"pairs": [{"image": "gone.png", "mask": "gone.png"}]}', "does not exist"),
        ('{"items": [{"name": "gone"}]}', "lacks the image"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.read_pairs(tmp_path)


def test_empty_mask_is_refused(tmp_path: Path) -> None:
    pairs = datasets.read_pairs(folder_of_pairs(tmp_path))
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(datasets.DatasetError, match="no object"):
        pairs[0].read_mask()
