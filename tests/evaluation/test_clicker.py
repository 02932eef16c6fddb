from __future__ import annotations

import numpy as np

from evaluation import clicker
from worker.contract import Click


def square(size: int, rows: slice, cols: slice) -> clicker.Mask:
    mask = np.zeros((size, size), bool)
    mask[rows, cols] = True
    return mask


def test_first_click_is_the_centre() -> None:
    click = clicker.first_click(square(40, slice(10, 21), slice(4, 35)))
    assert click.positive and click.y == 15.5
    assert 9 < click.x < 30


def test_the_border_of_the_image_is_outside() -> None:
    # A mask that fills the image has its centre in the middle, not in a corner.
    click = clicker.first_click(np.ones((21, 21), bool))
    assert (click.x, click.y) == (10.5, 10.5)


def test_answer_is_the_true_label() -> None:
    truth = square(10, slice(0, 5), slice(0, 10))
    assert clicker.answer(truth, 3.2, 4.9).positive
    assert not clicker.answer(truth, 3.2, 5.0).positive
    assert not clicker.answer(truth, 10.0, 10.0).positive  # the far corner still has a pixel


def test_oracle_takes_the_larger_error() -> None:
    truth = square(200, slice(20, 100), slice(20, 100))
    mask = square(200, slice(20, 100), slice(60, 100)) | square(200, slice(150, 160), slice(150, 160))
    click = clicker.oracle_click(truth, mask, ())
    assert click is not None and click.positive and click.x < 60
    small_miss = square(200, slice(20, 100), slice(22, 100)) | square(200, slice(150, 190), slice(150, 190))
    click = clicker.oracle_click(truth, small_miss, ())
    assert click is not None and not click.positive and click.x > 150


def test_equal_errors_give_a_negative_click() -> None:
    truth = square(100, slice(10, 21), slice(10, 21))
    mask = square(100, slice(60, 71), slice(60, 71))
    click = clicker.oracle_click(truth, mask, ())
    assert click is not None and not click.positive


def test_oracle_respects_exclusion_and_ends() -> None:
    truth = square(64, slice(20, 24), slice(20, 24))
    nothing = np.zeros((64, 64), bool)
    centre = clicker.oracle_click(truth, nothing, ())
    assert centre is not None
    again = clicker.oracle_click(truth, nothing, (centre,))
    assert again is not None
    assert (again.x - centre.x) ** 2 + (again.y - centre.y) ** 2 > 1.0  # 16 / 1024 of 64 pixels
    assert clicker.oracle_click(truth, truth, ()) is None


def test_ignored_errors_are_not_clicked() -> None:
    truth = square(64, slice(0, 32), slice(0, 32))
    assert clicker.oracle_click(truth, np.zeros((64, 64), bool), (), ignore=truth) is None


def test_human_like_clicks_inside_an_error_with_the_right_label() -> None:
    truth = square(128, slice(10, 60), slice(10, 60))
    mask = square(128, slice(40, 100), slice(40, 100))
    places = set()
    for seed in range(20):
        click = clicker.human_like_click(truth, mask, (), np.random.default_rng(seed))
        assert click is not None
        row, col = int(click.y), int(click.x)
        assert truth[row, col] != mask[row, col] and click.positive == truth[row, col]
        places.add((row, col))
    assert len(places) > 10
    assert clicker.human_like_click(truth, truth, (), np.random.default_rng(0)) is None


def test_human_like_misses_small_errors() -> None:
    truth = square(128, slice(10, 60), slice(10, 60))
    mask = truth.copy()
    mask[10:30, 10:30] = False  # 400 pixels, seen
    mask[100:103, 100:103] = True  # 9 pixels of 16,384: not seen
    for seed in range(10):
        click = clicker.human_like_click(truth, mask, (), np.random.default_rng(seed))
        assert click is not None and click.positive


def test_open_places_are_discs() -> None:
    places = clicker.open_places((1024, 1024), (Click(x=500.5, y=500.5),))
    assert not places[500, 516] and places[500, 517]
    assert places.sum() == 1024 * 1024 - 797  # lattice points within 16
