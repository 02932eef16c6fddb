from __future__ import annotations

import numpy as np
import pytest

from evaluation import metrics


def test_iou_by_hand() -> None:
    truth = np.zeros((4, 4), bool)
    truth[:2] = True  # 8 pixels
    mask = np.zeros((4, 4), bool)
    mask[1:3] = True  # 8 pixels, 4 in common, 12 in the union
    assert metrics.iou(mask, truth) == pytest.approx(4 / 12)
    ignore = np.zeros((4, 4), bool)
    ignore[2] = True  # the superfluous row is not judged
    assert metrics.iou(mask, truth, ignore) == pytest.approx(4 / 8)


def test_empty_union_is_not_a_division_by_zero() -> None:
    nothing = np.zeros((3, 3), bool)
    assert metrics.iou(nothing, nothing) == 1.0
    everything = ~nothing
    assert metrics.iou(everything, everything, ignore=everything) == 1.0


def test_auc_by_hand() -> None:
    assert metrics.auc(np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert metrics.auc(np.array([0.2, 0.4, 0.8])) == pytest.approx((0.3 + 0.6) / 2)
    assert metrics.auc(np.full(15, 0.7)) == pytest.approx(0.7)
    assert metrics.auc(np.array([0.3])) == pytest.approx(0.3)


def test_clicks_to_target() -> None:
    curve = np.array([0.5, 0.85, 0.6, 0.9])
    assert metrics.clicks_to(curve, 0.85) == (2, False)  # reaching it exactly counts
    assert metrics.clicks_to(curve, 0.90) == (4, False)  # success on the very last click is no failure
    assert metrics.clicks_to(curve, 0.95) == (4, True)


def test_object_measures() -> None:
    found = metrics.object_measures(np.array([0.5, 0.9, 0.7]))
    assert found["iou_1"] == 0.5
    assert found["iou_final"] == 0.7
    assert found["best_iou"] == 0.9
    assert found["delta_iou"] == pytest.approx(0.2)
    assert found["auc"] == pytest.approx(0.75)
    assert (found["noc85"], found["failures85"], found["noc90"], found["failures90"]) == (2, 0, 2, 0)
    assert metrics.best_so_far(np.array([0.5, 0.9, 0.7])).tolist() == [0.5, 0.9, 0.9]


def test_disc_share_of_known_shapes() -> None:
    rows, cols = np.mgrid[:201, :201]
    disc = (rows - 100) ** 2 + (cols - 100) ** 2 <= 80**2
    assert metrics.disc_share(disc) == pytest.approx(1.0, abs=0.03)
    square, bar = np.zeros((300, 500), bool), np.zeros((300, 500), bool)
    square[50:250, 100:300] = True
    bar[100:200, 50:450] = True
    assert metrics.disc_share(square) == pytest.approx(np.pi / 4, abs=0.02)
    assert metrics.disc_share(bar) == pytest.approx(np.pi / 16, abs=0.01)
    # Cut by the border, the bar is as thin as before.
    assert metrics.disc_share(bar[150:]) == pytest.approx(np.pi / 32, abs=0.01)
    with pytest.raises(ValueError, match="no shape"):
        metrics.disc_share(np.zeros((3, 3), bool))


def test_ranks_share_ties() -> None:
    assert metrics.ranks({"a": 0.5, "b": 0.9, "c": 0.5}) == {"a": 2.5, "b": 1.0, "c": 2.5}


def test_bootstrap_resamples_groups() -> None:
    # One image with two pairs is one observation: with a single group there is no spread at all.
    assert metrics.bootstrap(np.array([0.0, 1.0]), ["image", "image"]) == (0.5, 0.5)
    low, high = metrics.bootstrap(np.array([0.0, 1.0]), ["one", "two"])
    assert (low, high) == (0.0, 1.0)


def test_bootstrap_covers_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap(values, range(400))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_is_deterministic() -> None:
    values = np.arange(10.0)
    assert metrics.bootstrap(values, range(10), seed=3) == metrics.bootstrap(values, range(10), seed=3)
