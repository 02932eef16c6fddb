"""Looking at a part twice: what is mirrored lies where it should, and an answer has no left or right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from worker.backbones import Backbone, build
from worker.contract import Box, Click, Prompts
from worker.decode import Decoded, decode
from worker.encode import encode_window
from worker.frame import Frame, Window
from worker.head.features import pixel_features
from worker.mirror import mirrored_boxes, mirrored_map, mirrored_pixels, mirrored_points

#: 63.5 of 64 columns hold the image, and 40.25.
HALF = Frame((480, 635), (192, 254), (64, 64), (256, 256))
NARROW = Frame((800, 503), (256, 161), (64, 64), (256, 256))


@pytest.mark.parametrize("frame", [HALF, NARROW, Frame((600, 800), (192, 256), (64, 64), (256, 256))])
def test_maps_are_mirrored_where_the_image_lies(frame: Frame) -> None:
    rows, cols = torch.meshgrid(torch.arange(64.0), torch.arange(64.0) + 0.5, indexing="ij")
    found = mirrored_map(torch.stack([cols, rows]), frame)
    inside = int(frame.width) - 1
    assert torch.allclose(found[0, :, 1:inside], (frame.width - cols)[:, 1:inside], atol=1e-4)
    assert torch.equal(found[1], rows)
    twice = mirrored_map(found, frame)
    assert torch.allclose(twice[0, :, 1:inside], cols[:, 1:inside], atol=1e-4)


def test_points_and_boxes_lie_on_the_mirror_image_of_what_they_lay_on() -> None:
    pixels = torch.rand(1, 3, 192, 254)
    both = mirrored_pixels(pixels)
    points = torch.tensor([[[10.5, 20.5], [253.5, 0.5]]])
    moved = mirrored_points(points, HALF)
    for (x, y), (new_x, new_y) in zip(points[0].tolist(), moved[0].tolist(), strict=True):
        assert torch.equal(both[0, :, int(y), int(x)], both[1, :, int(new_y), int(new_x)])
    assert mirrored_boxes(torch.tensor([[10.0, 20.0, 54.0, 60.0]]), HALF).tolist() == [[200.0, 20.0, 244.0, 60.0]]


def _answers(image: NDArray[np.uint8], backbone: Backbone, xs: tuple[float, ...]) -> Decoded:
    """The answer to clicks at `xs`, the first one positive, fed a mask that grows downwards."""
    height, width = image.shape[:2]
    seen = encode_window(backbone, image, Window(0, 0, width, height), (height, width))
    clicks = tuple(Click(x=x, y=70.5, positive=not number) for number, x in enumerate(xs))
    rows, columns = (4 * side for side in seen.features.shape[-2:])
    grows = torch.linspace(-3, 3, rows)[None, :, None].expand(1, -1, columns)
    return decode(backbone, seen, Prompts(clicks=clicks), grows)


@pytest.mark.parametrize("size", [(120, 160), (160, 99)])
def test_an_image_and_its_mirror_image_have_mirrored_answers(size: tuple[int, int]) -> None:
    backbone = build("tiny", device="cpu")
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    image[40:100, 20:60] //= 3
    width = size[1]
    one = _answers(image, backbone, (40.5, 75.0))
    other = _answers(np.ascontiguousarray(image[:, ::-1]), backbone, (width - 40.5, width - 75.0))
    valid = slice(0, one.frame.valid[0]), slice(1, int(one.frame.width) - 1)
    # Between columns a mean of neighbours is taken, in one of the two views of each.
    near = 1e-3 if one.frame.width == int(one.frame.width) else 0.1
    difference = (one.logits - mirrored_map(other.logits, other.frame))[valid].abs()
    assert float(difference.mean()) < near
    assert one.predicted_iou == pytest.approx(other.predicted_iou, abs=2e-3)


def test_the_mean_is_still_one_linear_head() -> None:
    backbone = build("tiny", device="cpu")
    image = np.random.default_rng(1).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    decoded = _answers(image, backbone, (40.5, 75.0))
    total = (decoded.upscaled * decoded.hyper[:, None, None]).sum(0)
    assert torch.allclose(total, decoded.logits, atol=2e-3)
    features = pixel_features(decoded, Prompts(clicks=(Click(x=40.5, y=70.5),)))
    channels = len(decoded.hyper)
    assert torch.allclose(features[1 : 1 + channels].sum(0), features[0], atol=2e-3)


def test_a_box_is_mirrored_too() -> None:
    backbone = build("tiny", device="cpu")
    image = np.full((120, 160, 3), 60, np.uint8)
    image[30:90, 10:50] = (200, 90, 60)
    seen = encode_window(backbone, image, Window(0, 0, 160, 120), (120, 160))
    decoded = decode(backbone, seen, Prompts(box=Box(x0=8, y0=28, x1=52, y1=92)))
    inside = (decoded.logits > 0).float()
    col, _ = decoded.frame.to_lowres(80.0, 0.0)
    assert inside[:, : int(col)].sum() > 100
    assert inside[:, int(col) :].sum() == 0
