from __future__ import annotations

import numpy as np

from ml_backend.embed_cli import EMBEDDING_BYTES
from worker.backbones import build
from worker.embeddings import encode


def test_the_estimate_for_tiny_is_what_an_embedding_takes() -> None:
    embedding = encode(build("tiny", device="cpu"), np.zeros((30, 40, 3), np.uint8))
    assert embedding.size == EMBEDDING_BYTES["tiny"]
