from __future__ import annotations

import numpy as np

from worker.outlines import prompts_of, rings


def test_a_rectangle_has_four_corners_in_percent() -> None:
    mask = np.zeros((100, 200), bool)
    mask[20:60, 50:150] = True
    mask[80:90, 10:20] = True
    (large, small) = rings(mask)
    assert sorted(large) == sorted([(25.25, 20.5), (25.25, 59.5), (74.75, 59.5), (74.75, 20.5)])
    assert len(small) == 4
    assert rings(np.zeros((5, 5), bool)) == []


def test_prompts_of_a_rough_mask() -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:41, 20:51] = True
    mask[50:52, 70:72] = True
    found = prompts_of(mask)
    assert found is not None
    assert found.box is not None
    assert (found.box.x0, found.box.y0, found.box.x1, found.box.y1) == (20, 10, 72, 52)
    (click,) = found.clicks
    assert (click.x, click.y) == (35.5, 25.5)
    assert prompts_of(np.zeros((4, 4), bool)) is None


def test_the_border_of_the_image_ends_an_object() -> None:
    found = prompts_of(np.ones((21, 41), bool))
    assert found is not None
    assert found.clicks[0].y == 10.5
