from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import uniform_filter

from worker.head.features import LOGIT_CLIP, smoothed


def test_smoothed_is_two_means_over_the_image_alone() -> None:
    logits = 6.0 * torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    found = smoothed(logits, (17, 24))
    inside = np.clip(logits[:17].double().numpy(), -LOGIT_CLIP, LOGIT_CLIP)
    expected = uniform_filter(uniform_filter(inside, 3, mode="nearest"), 3, mode="nearest")
    np.testing.assert_allclose(found[:17].numpy(), expected, atol=1e-4)
    assert torch.equal(found[17:], found[16:17].expand(3, 24))
    padding = logits.clone()
    padding[17:] = 99.0
    assert torch.equal(smoothed(padding, (17, 24)), found)


def test_a_ragged_border_becomes_straight_and_stays_where_it_is() -> None:
    rows, cols = np.mgrid[:32, :32]
    logits = torch.from_numpy(np.where(cols - 15.5 + (-1.0) ** rows < 0, 2.0, -2.0)).float()  # teeth of two cells
    inside = smoothed(logits, (32, 32)) > 0
    edges = inside.sum(1)
    assert set(edges[2:-2].tolist()) <= {15, 16, 17}
    assert (edges[2:-2].diff().abs() <= 1).all()
    assert abs(float(inside.float().mean() - (logits > 0).float().mean())) < 0.01
