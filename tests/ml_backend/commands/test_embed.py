from __future__ import annotations

import numpy as np

from ml_backend.commands.embed import EMBEDDING_BYTES
from worker.backbones import build
from worker.encode import encode


def test_the_estimate_for_tiny_is_what_a_square_image_takes_and_others_take_less() -> None:
    backbone = build("tiny", device="cpu")
    square, photograph = (encode(backbone, np.zeros((height, 40, 3), np.uint8)).size for height in (40, 30))
    assert (square, photograph) == (EMBEDDING_BYTES["tiny"], 0.75 * EMBEDDING_BYTES["tiny"])
