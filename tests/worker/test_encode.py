from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from worker.backbones import Backbone, build
from worker.backbones.tiny import GRAIN, STRIDE
from worker.encode import Embedding, encode, from_bytes, to_bytes


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return replace(build("tiny", device="cpu"), grain=None)  # padded to the square, as `SamPredictor` does


def test_encode_is_set_image(backbone: Backbone) -> None:
    image = np.random.default_rng(0).integers(0, 255, (201, 333, 3), dtype=np.uint8)
    predictor = SamPredictor(backbone.sam)
    predictor.set_image(image)
    embedding = encode(backbone, image)
    assert embedding.features.dtype == torch.float16
    torch.testing.assert_close(embedding.features.float(), predictor.features, rtol=1e-3, atol=1e-5)
    assert embedding.original_size == predictor.original_size == (201, 333)
    assert embedding.input_size == predictor.input_size
    assert embedding.colours.shape == (3, 4 * embedding.features.shape[2], 4 * embedding.features.shape[3])
    small = torch.from_numpy(image).permute(2, 0, 1)[:, :100, :166].float().mean()
    rows, columns = (round(side * 4 / 8) for side in embedding.input_size)
    assert abs(float(embedding.colours[:, : rows // 2, : columns // 2].float().mean() - small)) < 2
    assert not embedding.features.is_inference()


def test_no_padding_is_encoded_but_for_whole_cells(backbone: Backbone) -> None:
    image = np.random.default_rng(0).integers(0, 255, (201, 333, 3), dtype=np.uint8)
    trimmed = replace(backbone, grain=GRAIN)
    embedding = encode(trimmed, image)
    height, width = embedding.input_size
    padded = (-(-height // GRAIN) * GRAIN, width)
    assert trimmed.padded_size(embedding.input_size) == padded
    assert embedding.features.shape[2:] == (padded[0] // STRIDE, padded[1] // STRIDE)
    whole = encode(backbone, image)
    rows = padded[0] // STRIDE * 4
    torch.testing.assert_close(embedding.colours, whole.colours[:, :rows], rtol=0, atol=0)
    assert not whole.colours[:, rows:].any()


def test_bytes_round_trip_exactly() -> None:
    colours = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    embedding = Embedding(torch.randn(1, 4, 8, 8), colours, (30, 40), (288, 384))
    again = from_bytes(to_bytes(embedding))
    assert torch.equal(again.features, embedding.features)
    assert torch.equal(again.colours, embedding.colours)
    assert (again.original_size, again.input_size) == ((30, 40), (288, 384))
