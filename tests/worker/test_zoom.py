"""Looking from near: where, what is carried over, and that answers stay functions of image and prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch

from worker import zoom
from worker.backbones import Backbone, build
from worker.byte_lru import ByteLRU
from worker.contract import Box, Click, Prompts
from worker.decode import Earlier, LogitsCache, decode, decode_next, decode_session
from worker.encode import Embedding, encode, encode_window
from worker.frame import Frame, Window
from worker.masks import to_mask

SIZE = (600, 800)
CENTRE, RADIUS = (500.0, 200.0), 40.0
FIRST = Prompts(clicks=(Click(x=500.0, y=200.0),))


def _disc() -> npt.NDArray[np.bool_]:
    rows, cols = np.mgrid[: SIZE[0], : SIZE[1]]
    found: npt.NDArray[np.bool_] = (cols + 0.5 - CENTRE[0]) ** 2 + (rows + 0.5 - CENTRE[1]) ** 2 < RADIUS**2
    return found


@cache
def _image() -> npt.NDArray[np.uint8]:
    image = np.random.default_rng(0).integers(40, 90, (*SIZE, 3), dtype=np.uint8)
    image[_disc()] += np.array([120, 60, 0], np.uint8)
    return image


@cache
def _model() -> tuple[Backbone, Embedding]:
    backbone = build("tiny", device="cpu")
    return backbone, encode(backbone, _image())


def _round(window: Window | None = None, *, inside: tuple[slice, slice] | None = None) -> Earlier:
    """A round on a 64-cell map of the whole image, or of a part; positive logits in `inside` (rows, columns)."""
    height, width = SIZE if window is None else window.size
    side = max(height, width)
    frame = Frame(SIZE, (round(256 * height / side), round(256 * width / side)), (64, 64), (256, 256), window)
    logits = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) - 8.0
    if inside is not None:
        logits[inside] += 16.0
    return Earlier(logits, frame)


def test_the_part_holds_the_mask_and_the_positive_clicks_with_a_margin() -> None:
    before = _round(inside=(slice(10, 20), slice(30, 40)))  # x 375 to 500, y 125 to 250
    found = zoom.follow(before, Prompts(clicks=(Click(x=400, y=200), Click(x=10, y=590, positive=False))))
    assert found == Window(375 - 50, 125 - 50, 500 + 50, 250 + 50)
    wider = zoom.follow(before, Prompts(clicks=(Click(x=400, y=200), Click(x=520, y=90))))
    assert wider is not None
    assert wider.covers(Window(375, 90, 520, 250))
    boxed = zoom.follow(before, Prompts(box=Box(x0=350, y0=100, x1=450, y1=200)))
    assert boxed is not None
    assert boxed.covers(Window(350, 100, 500, 250))


def test_the_part_ends_at_the_image_and_is_never_a_few_pixels() -> None:
    corner = zoom.follow(_round(), Prompts(clicks=(Click(x=799.0, y=599.0),)))
    assert corner == Window(767, 567, 800, 600)
    middle = zoom.follow(_round(), Prompts(clicks=(Click(x=400.0, y=300.0),)))
    assert middle is not None
    assert middle.size == (zoom.LEAST_SIDE, zoom.LEAST_SIDE)


def test_specks_do_not_widen_the_part() -> None:
    before = _round(inside=(slice(10, 20), slice(30, 40)))
    expected = zoom.follow(before, Prompts(clicks=(Click(x=400, y=200),)))
    before.logits[44, 2] = 9.0
    assert zoom.follow(before, Prompts(clicks=(Click(x=400, y=200),))) == expected


def test_a_large_object_is_looked_at_as_a_whole() -> None:
    before = _round(inside=(slice(4, 40), slice(4, 60)))
    assert zoom.follow(before, Prompts(clicks=(Click(x=400, y=200),))) == Window(0, 0, 800, 600)


def test_nothing_to_follow_without_an_object() -> None:
    before = _round(inside=(slice(10, 20), slice(30, 40)))
    assert zoom.follow(before, Prompts(clicks=(Click(x=400, y=200, positive=False),))) is None


def test_the_part_stays_while_it_will_do() -> None:
    part = Window(300, 100, 620, 340)  # five pixels a cell
    fits = _round(part, inside=(slice(12, 34), slice(20, 44)))  # x 400 to 520, y 160 to 270
    assert zoom.follow(fits, Prompts(clicks=(Click(x=440, y=200),))) == part
    # A fifth of 120 pixels must be left on each side.
    for bottom, stays in ((310.0, True), (317.0, False)):
        found = zoom.follow(fits, Prompts(clicks=(Click(x=440, y=200), Click(x=440, y=bottom))))
        assert (found == part) == stays


@pytest.mark.parametrize(
    ("part", "cells", "stays"),
    [
        # 0.56 and 0.48 of 320 pixels, nine for each cell of the mask.
        (Window(300, 100, 620, 340), 20, True),
        (Window(300, 100, 620, 340), 17, False),
        # Of the whole image 0.59 and 0.62, 22.5 for each.
        (Window(0, 0, 800, 600), 21, False),
        (Window(0, 0, 800, 600), 22, True),
    ],
)
def test_a_part_gives_way_to_one_of_half_its_length_the_whole_image_sooner(
    part: Window, cells: int, stays: bool
) -> None:
    before = _round(part, inside=(slice(14, 14 + cells), slice(20, 20 + cells)))
    col, row = 20 + cells / 2, 14 + cells / 2
    x, y = before.frame.to_original(col, row)
    found = zoom.follow(before, Prompts(clicks=(Click(x=x, y=y),)))
    assert found is not None
    assert (found == part) == stays
    assert stays or max(found.size) < max(part.size)


@pytest.mark.parametrize("old", [None, Window(100, 50, 700, 450)])
@pytest.mark.parametrize("new", [None, Window(380, 100, 620, 400), Window(20, 20, 200, 120)])
def test_logits_are_carried_to_where_they_lay(old: Window | None, new: Window | None) -> None:
    before, frame = _round(old), _round(new).frame
    before.logits.add_(torch.linspace(0, 9, 64))
    moved = zoom.carried_over(before, frame)
    if old == new:
        assert torch.equal(moved[0], before.logits)
        return
    values = before.logits.double().numpy()
    rows, cols = before.frame.valid
    for row in range(0, 64, 7):
        for col in range(0, 64, 5):
            x, y = before.frame.to_lowres(*frame.to_original(col + 0.5, row + 0.5))
            if not (0 <= x <= cols and 0 <= y <= rows):
                assert moved[0, row, col] == zoom.UNSEEN
                continue
            x, y = min(max(x - 0.5, 0.0), 63.0), min(max(y - 0.5, 0.0), 63.0)
            left, top = min(math.floor(x), 62), min(math.floor(y), 62)
            a, b = x - left, y - top
            expected = (1 - b) * ((1 - a) * values[top, left] + a * values[top, left + 1]) + b * (
                (1 - a) * values[top + 1, left] + a * values[top + 1, left + 1]
            )
            assert float(moved[0, row, col]) == pytest.approx(expected, abs=1e-3)


def test_a_part_is_decoded_as_an_image_of_its_own() -> None:
    backbone, _ = _model()
    part = Window(400, 120, 620, 300)
    alone = encode(backbone, np.ascontiguousarray(_image()[part.slices]))
    within = encode_window(backbone, _image(), part, SIZE)
    assert within.original_size == SIZE
    # Of two views the first; what they are together is in test_mirror.py.
    torch.testing.assert_close(within.features[:1].float(), alone.features.float(), atol=2e-3, rtol=2e-3)
    within = replace(within, features=alone.features)
    clicks = (Click(x=500.0, y=200.0), Click(x=610.0, y=130.0, positive=False))
    moved = tuple(Click(x=c.x - 400, y=c.y - 120, positive=c.positive) for c in clicks)
    far = Click(x=20.0, y=20.0, positive=False)
    one = decode(backbone, within, Prompts(clicks=(*clicks, far), box=Box(x0=450, y0=150, x1=550, y1=250)))
    other = decode(backbone, alone, Prompts(clicks=moved, box=Box(x0=50, y0=30, x1=150, y1=130)))
    assert torch.equal(one.logits, other.logits)
    mask = to_mask(one.logits, one.frame, Prompts(clicks=clicks))
    assert not np.delete(mask, np.s_[120:300], axis=0).any()
    assert not np.delete(mask, np.s_[400:620], axis=1).any()
    assert np.array_equal(mask[part.slices], to_mask(other.logits, other.frame, Prompts(clicks=moved)))


def test_parts_of_a_huge_image_are_cut_from_a_smaller_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = _model()
    assert zoom.shrunk(_image()) is _image()
    monkeypatch.setattr(zoom, "MOST_SIDE", 400)
    half = zoom.shrunk(_image())
    assert half.shape == (300, 400, 3)
    assert half[200:, 100:].mean() == pytest.approx(_image()[400:, 200:].mean(), abs=0.5)
    found = zoom.looker(backbone, _image())(Window(400, 120, 620, 300))
    assert found is not None
    assert (found.original_size, found.window) == (SIZE, Window(400, 120, 620, 300))
    alone = encode(backbone, np.ascontiguousarray(half[60:150, 200:310]))
    # To one step of half precision: two images in one pass are summed in another order.
    assert torch.allclose(found.features[:1].float(), alone.features.float(), rtol=1e-3, atol=1e-3)


def test_a_small_object_is_cut_out_better_from_near() -> None:
    backbone, embedding = _model()
    look = zoom.looker(backbone, _image())
    near, far = decode_next(backbone, embedding, FIRST, None, look), decode(backbone, embedding, FIRST)
    assert near.frame.window is not None
    assert max(near.frame.window.size) < 400

    def quality(logits: torch.Tensor, frame: Frame) -> float:
        mask = to_mask(logits, frame, FIRST)
        return float((mask & _disc()).sum() / (mask | _disc()).sum())

    assert quality(near.logits, near.frame) > max(quality(far.logits, far.frame), 0.9)


def test_a_session_from_near_is_pure() -> None:
    backbone, embedding = _model()
    look = zoom.looker(backbone, _image())
    clicks = (*FIRST.clicks, Click(x=590.0, y=210.0, positive=False), Click(x=470.0, y=180.0), Click(x=700.0, y=500.0))
    warm: LogitsCache = ByteLRU(1 << 24)
    for count in range(1, len(clicks) + 1):
        answer = decode_session(backbone, embedding, Prompts(clicks=clicks[:count]), warm, "image", look)
        assert answer.frame.visible(Prompts(clicks=clicks[:count])).clicks
    cold = decode_session(backbone, embedding, Prompts(clicks=clicks), look=zoom.looker(backbone, _image()))
    assert answer.frame == cold.frame
    assert torch.equal(answer.logits, cold.logits)


def test_without_the_image_the_whole_is_decoded() -> None:
    backbone, embedding = _model()
    prompts = Prompts(clicks=(*FIRST.clicks, Click(x=590.0, y=210.0, positive=False)))
    plain = decode_session(backbone, embedding, prompts)
    gone = decode_session(backbone, embedding, prompts, look=lambda _window: None)
    off = build("tiny", device="cpu", zoom="off")
    assert plain.frame.window is None
    assert gone.frame.window is None
    assert torch.equal(
        plain.logits, decode_session(off, embedding, prompts, look=zoom.looker(backbone, _image())).logits
    )
    assert build("tiny", device="cpu").zoom
    assert not build("mobile_sam", device="cpu", random_weights=True).zoom
    assert build("mobile_sam", device="cpu", random_weights=True, zoom="on").zoom
