from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from worker.backbones.tiny import build_tiny
from worker.contract import Click, Prompts
from worker.frame import Frame
from worker.masks import clean, to_mask, upsample


@pytest.fixture(scope="module")
def sam() -> Sam:
    return build_tiny()


def _frame(size: tuple[int, int], sam: Sam) -> Frame:
    side = sam.image_encoder.img_size
    scale = side / max(size)
    input_size = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    return Frame(size, input_size, (side // 2, side // 2), (side, side))


def _blobs(frame: Frame, seed: int) -> Tensor:
    torch.manual_seed(seed)
    coarse = torch.randn(1, 1, 12, 12)
    return torch.nn.functional.interpolate(coarse, frame.lowres_size, mode="bicubic")[0, 0]


@pytest.mark.parametrize("size", [(97, 97), (701, 333), (333, 1701), (1, 50), (64, 64), (1500, 2000)])
def test_upsample_is_sams_own(sam: Sam, size: tuple[int, int]) -> None:
    frame = _frame(size, sam)
    noise = torch.randn(frame.lowres_size, generator=torch.Generator().manual_seed(0))
    for logits in (_blobs(frame, 0), _blobs(frame, 1), noise):
        expected = sam.postprocess_masks(logits[None, None], frame.input_size, size)[0, 0].numpy() > 0
        found = upsample(logits, frame, size)
        assert found.shape == size
        assert found.dtype == np.bool_
        assert (found == expected).mean() >= 0.9999


def test_upsample_of_nothing_and_of_everything(sam: Sam) -> None:
    frame = _frame((300, 401), sam)
    ones = torch.ones(frame.lowres_size)
    assert upsample(ones, frame, (300, 401)).all()
    assert not upsample(-ones, frame, (300, 401)).any()
    assert upsample(ones, frame, (150, 200)).shape == (150, 200)


def test_clean_drops_specks_and_fills_holes_without_clicks(sam: Sam) -> None:
    frame = _frame((384, 384), sam)
    logits = torch.full(frame.lowres_size, -2.0)
    logits[20:100, 20:100] = 2.0
    logits[150, 150] = logits[160, 160] = 2.0  # two specks
    logits[40, 40] = logits[60, 60] = -2.0  # two holes
    logits[120:140, 20:60] = 2.0  # a second part that is no speck
    clicks = (Click(x=301, y=301), Click(x=81, y=81, positive=False))
    found = clean(logits, frame, Prompts(clicks=clicks)) > 0
    assert found[150, 150]
    assert not found[40, 40]
    assert not found[160, 160]
    assert found[60, 60]
    assert found[120:140, 20:60].all()
    assert logits[160, 160] == 2.0  # the argument is left alone


def test_clean_keeps_a_mask_that_is_all_speck(sam: Sam) -> None:
    frame = _frame((384, 384), sam)
    logits = torch.full(frame.lowres_size, -1.0)
    logits[10, 10] = 1.0
    assert (clean(logits, frame, Prompts()) > 0).sum() == 1


def test_every_click_is_honoured(sam: Sam) -> None:
    rng = np.random.default_rng(0)
    size = (701, 933)
    frame = _frame(size, sam)
    for seed in range(10):
        xy = rng.random((8, 2)) * (size[1], size[0])
        xy[1] = xy[0] + 1.5  # opposite clicks side by side
        xy[2] = (size[1], size[0])  # on the border
        clicks = tuple(Click(x=x, y=y, positive=i % 2 == 0) for i, (x, y) in enumerate(xy.tolist()))
        logits = _blobs(frame, seed)
        for shape in (size, (350, 466)):
            mask = to_mask(logits, frame, Prompts(clicks=clicks), shape)
            for click in clicks:
                x = min(int(click.x * shape[1] / size[1]), shape[1] - 1)
                y = min(int(click.y * shape[0] / size[0]), shape[0] - 1)
                assert shape != size or mask[y, x] == click.positive


def test_repair_is_small(sam: Sam) -> None:
    frame = _frame((384, 384), sam)
    logits = torch.full(frame.lowres_size, -1.0)
    mask = to_mask(logits, frame, Prompts(clicks=(Click(x=100.5, y=50.5),)))
    rows, cols = mask.nonzero()
    assert mask[50, 100]
    assert np.hypot(rows - 50, cols - 100).max() <= 3.0


def test_opposite_clicks_on_one_pixel_the_later_counts(sam: Sam) -> None:
    frame = _frame((384, 384), sam)
    logits = torch.full(frame.lowres_size, -1.0)
    clicks = (Click(x=9.2, y=9.2), Click(x=9.4, y=9.4, positive=False))
    assert not to_mask(logits, frame, Prompts(clicks=clicks))[9, 9]
    assert to_mask(logits, frame, Prompts(clicks=clicks[::-1]))[9, 9]
