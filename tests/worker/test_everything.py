from __future__ import annotations

import numpy as np
import torch

from worker.contract import Everything
from worker.everything import LEAST, Candidate, grid, stability_score, suited, without_overlap


def test_the_grid_is_even() -> None:
    points = grid((100, 200), 4)
    assert len(points) == 16
    assert points[0] == (25.0, 12.5)
    assert points[-1] == (175.0, 87.5)


def test_stability_is_the_iou_of_two_thresholds() -> None:
    assert stability_score(torch.tensor([[2.0, 0.5, -0.5, -2.0]])) == 1 / 3
    assert stability_score(torch.full((2, 2), -5.0)) == 0.0


def test_filters_that_are_not_named_suit_the_backbone() -> None:
    assert suited(Everything(), "vit_b") == Everything(min_iou=0.7, min_stability=0.8)
    assert suited(Everything(min_stability=0.0), "tiny") == Everything(min_iou=LEAST["tiny"][0], min_stability=0.0)


def test_no_two_that_stay_overlap_and_the_better_one_stays() -> None:
    rng = np.random.default_rng(0)
    masks = [torch.from_numpy((rng.random(64) < 0.5).astype(np.float32)) for _ in range(40)]
    candidates = [Candidate(n, 0, quality=float(q), small=masks[n]) for n, q in enumerate(rng.random(40))]
    kept = without_overlap(candidates, 0.35)

    def iou(a: Candidate, b: Candidate) -> float:
        both = float((a.small * b.small).sum())
        return both / (float(a.small.sum() + b.small.sum()) - both)

    slow: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: -one.quality):
        if all(iou(one, other) <= 0.35 for other in slow):
            slow.append(one)
    assert [one.x for one in kept] == [one.x for one in slow]
    assert 1 < len(kept) < 40
    assert without_overlap([], 0.5) == []
