from __future__ import annotations

import pytest

from worker.contract import Box, Click, Prompts
from worker.frame import Frame, Window

WHOLE = Frame(original_size=(701, 933), input_size=(769, 1024), lowres_size=(256, 256), padded_size=(1024, 1024))
PART = Frame((701, 933), (1024, 512), (256, 256), (1024, 1024), Window(100, 300, 300, 700))


def test_places_go_there_and_back() -> None:
    for frame in (WHOLE, PART):
        for x, y in [(0.0, 0.0), (0.5, 0.5), (411.3, 700.9)]:
            assert frame.to_original(*frame.to_lowres(x, y)) == pytest.approx((x, y))


def test_the_corners_of_what_is_seen_are_those_of_the_valid_cells() -> None:
    assert WHOLE.to_lowres(933.0, 701.0) == pytest.approx((256.0, 192.25))
    assert WHOLE.valid == (193, 256)
    assert PART.to_lowres(100.0, 300.0) == pytest.approx((0.0, 0.0))
    assert PART.to_lowres(300.0, 700.0) == pytest.approx((128.0, 256.0))
    assert PART.valid == (256, 128)


def test_clicks_outside_of_a_part_are_not_visible() -> None:
    inside, border, outside = (
        Click(x=150.0, y=400.0),
        Click(x=300.0, y=700.0),
        Click(x=300.5, y=500.0, positive=False),
    )
    prompts = Prompts(clicks=(inside, outside, border), box=Box(x0=120, y0=310, x1=200, y1=400))
    assert PART.visible(prompts) == Prompts(clicks=(inside, border), box=prompts.box)
    assert WHOLE.visible(prompts) is prompts


def test_a_part_keeps_its_place_in_an_image_of_another_size() -> None:
    part = Window(100, 300, 300, 700)
    assert part.scaled((701, 933), (701, 933)) == part
    assert part.scaled((800, 1000), (400, 500)) == Window(50, 150, 150, 350)
    assert part.scaled((800, 1000), (2, 2)).size == (1, 1)  # never nothing
    assert part.size == (400, 200)
    assert part.covers(Window(100, 300, 299, 700))
    assert not part.covers(Window(99, 300, 299, 700))
