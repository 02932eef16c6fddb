"""What a session notes of clicks, the ones outside of the part that is looked at included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.datasets import Pair, read_pairs
from evaluation.session import Session
from worker.backbones import build
from worker.contract import Click, Prompts
from worker.proposer import Proposer


def pair(root: Path) -> Pair:
    """A small square far from the middle of a picture of 400 x 300."""
    image = np.random.default_rng(0).integers(0, 90, (300, 400, 3), dtype=np.uint8)
    mask = np.zeros((300, 400), np.uint8)
    mask[40:80, 300:350] = 255
    image[mask > 0] += 120
    Image.fromarray(image).save(root / "image.png")
    Image.fromarray(mask).save(root / "mask.png")
    named = {"name": "square", "pairs": [{"image": "image.png", "mask": "mask.png"}]}
    (root / "metadata.json").write_text(json.dumps(named))
    return read_pairs(root)[0]


def test_negative_clicks_outside_of_the_part_are_honoured(tmp_path: Path) -> None:
    backbone = build("tiny", device="cpu")
    session = Session.open(backbone, Proposer(backbone, head="none", data_dir=tmp_path, stop=False), pair(tmp_path))
    clicks = (Click(x=325.0, y=60.0), Click(x=20.0, y=280.0, positive=False), Click(x=390.0, y=20.0, positive=False))
    given = [(click, Prompts(clicks=clicks[: number + 1])) for number, click in enumerate(clicks)]
    with torch.inference_mode():
        rows = session.replay(given, 4)
        window = session.decode(given[0][1]).frame.window
    assert window is not None
    assert not (window.x0 <= 20 <= window.x1 and window.y0 <= 280 <= window.y1)
    assert [row["honoured_raw"] for row in rows] == ["1"] * 4
    assert [row["honoured"] for row in rows] == ["1"] * 4
    assert float(str(rows[2]["iou"])) > 0.8
