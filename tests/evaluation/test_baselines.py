from __future__ import annotations

import numpy as np
import pytest

from evaluation import baselines
from evaluation.metrics import iou
from worker.contract import Click


@pytest.fixture
def truth() -> baselines.Mask:
    mask = np.zeros((80, 100), bool)
    mask[20:60, 30:70] = True
    return mask


@pytest.mark.parametrize("name", baselines.ONE_SHOT)
@pytest.mark.parametrize("count", [1, 2, 5, 15])
def test_one_shot_clicks_are_true_and_counted(truth: baselines.Mask, name: str, count: int) -> None:
    clicks = baselines.one_shot_clicks(truth, count, baselines.ONE_SHOT[name], np.random.default_rng(0))
    assert len(clicks) == count
    assert all(truth[int(c.y), int(c.x)] == c.positive for c in clicks)
    assert abs(2 * sum(c.positive for c in clicks) - count) <= 1
    assert clicks == baselines.one_shot_clicks(truth, count, baselines.ONE_SHOT[name], np.random.default_rng(0))


def test_entropy_places_are_the_peaks_and_apart(truth: baselines.Mask) -> None:
    entropy = np.zeros(truth.shape, np.float32)
    entropy[25, 35], entropy[25, 36], entropy[50, 60] = 3.0, 2.9, 2.0
    places = baselines.entropy_places(entropy)(truth, 2, np.random.default_rng(0))
    assert places == [(25, 35), (50, 60)]


def test_max_distance_spreads(truth: baselines.Mask) -> None:
    places = np.array(baselines.max_distance_places(truth, 4, np.random.default_rng(0)))
    apart = np.sqrt(((places[:, None] - places[None]) ** 2).sum(2))[np.triu_indices(4, 1)]
    assert apart.min() > 20


@pytest.mark.parametrize("segment", [baselines.grabcut, baselines.random_walker])
def test_classical_segmenters_find_a_bright_square(truth: baselines.Mask, segment: object) -> None:
    rng = np.random.default_rng(0)
    image = (rng.normal(60, 8, (80, 100, 3)) + 120 * truth[..., None]).clip(0, 255).astype(np.uint8)
    clicks = (Click(x=50.5, y=40.5), Click(x=10.5, y=10.5, positive=False), Click(x=85.5, y=40.5, positive=False))
    assert callable(segment)
    assert iou(segment(image, clicks), truth) > 0.8
