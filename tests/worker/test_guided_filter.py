from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from worker.guided_filter import CLIP, RADIUS, STEP, guided, guided_filter

REACH = (2 * RADIUS + 2) * STEP


def slow(mask: NDArray[np.float64], guide: NDArray[np.float64], radius: int, epsilon: float) -> NDArray[np.float64]:
    """The filter as the paper states it, a ridge regression in each window and the mean of what they say, but colours
    that explain less than 0.4 of the mask's variance are followed less, those with less than 0.2 not at all."""
    height, width = mask.shape
    side = 2 * radius + 1
    padded, colours = np.pad(mask, radius, "edge"), np.pad(guide, ((0, 0), (radius, radius), (radius, radius)), "edge")
    slopes, offsets = np.empty((3, height, width)), np.empty((height, width))
    for row in range(height):
        for col in range(width):
            window = np.s_[row : row + side, col : col + side]
            seen, wanted = colours[(slice(None), *window)].reshape(3, -1), padded[window].ravel()
            covariance = np.cov(seen, bias=True) + epsilon * np.eye(3)
            shared = (seen * wanted).mean(1) - seen.mean(1) * wanted.mean()
            slope = np.linalg.solve(covariance, shared)
            explained = slope @ shared / (wanted.var() + 1e-3)
            slope *= min(max((explained - 0.2) / 0.2, 0.0), 1.0)
            slopes[:, row, col], offsets[row, col] = slope, wanted.mean() - slope @ seen.mean(1)
    slopes = np.pad(slopes, ((0, 0), (radius, radius), (radius, radius)), "edge")
    offsets = np.pad(offsets, radius, "edge")
    found = np.empty((height, width))
    for row in range(height):
        for col in range(width):
            window = np.s_[row : row + side, col : col + side]
            found[row, col] = slopes[(slice(None), *window)].mean((1, 2)) @ guide[:, row, col] + offsets[window].mean()
    return found


def test_it_is_the_guided_filter_of_the_paper_where_colours_explain_the_mask() -> None:
    rng = np.random.default_rng(0)
    guide = rng.random((3, 14, 19))
    mask = guide[0] - guide[2] + rng.standard_normal((14, 19)) * np.linspace(0, 2, 19)
    guide[:, :, 10:] = guide[:, :1, 10:11]  # the same colour all over: a singular covariance
    for radius, epsilon in ((2, 1e-4), (4, 3e-5), (4, 1e-2)):
        found = guided_filter(mask.astype(np.float32), guide.astype(np.float32), radius, epsilon)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, slow(mask, guide, radius, epsilon), atol=2e-4)


def test_grey_images_of_two_tones_lose_no_digits() -> None:
    rng = np.random.default_rng(0)
    grey = (rng.random((14, 19)) > 0.5).astype(np.float64)
    mask = grey + rng.standard_normal((14, 19)) * 0.4
    guide = np.stack([grey] * 3)
    found = guided_filter(mask.astype(np.float32), guide.astype(np.float32), 3, 3e-5)
    np.testing.assert_allclose(found, slow(mask, guide, 3, 3e-5), atol=1e-3)


def test_coefficients_from_a_coarser_grid_are_as_good_where_that_shows_everything() -> None:
    rng = np.random.default_rng(0)
    mask, guide = rng.standard_normal((12, 18)).astype(np.float32), rng.random((3, 12, 18)).astype(np.float32)
    large = guided_filter(mask.repeat(2, 0).repeat(2, 1), guide.repeat(2, 1).repeat(2, 2), 3, 1e-3, step=2)
    # Windows are the same; what is interpolated are their smooth coefficients.
    means = large.reshape(12, 2, 18, 2).mean((1, 3))
    np.testing.assert_allclose(means, guided_filter(mask, guide, 3, 1e-3), atol=0.05)
    uneven = guided_filter(mask[:11, :17].copy(), guide[:, :11, :17].copy(), 3, 1e-3, step=2)
    assert uneven.shape == (11, 17) and np.isfinite(uneven).all()


def disc(side: int, radius: float) -> NDArray[np.bool_]:
    rows, cols = np.mgrid[:side, :side] - side / 2 + 0.5
    return np.asarray(rows**2 + cols**2 < radius**2)


def test_a_border_moves_to_where_colours_change() -> None:
    truth, rough = disc(64, 20.0), disc(64, 23.0)
    colours = torch.from_numpy(np.where(truth, [[[0.8]], [[0.3]], [[0.4]]], [[[0.5]], [[0.4]], [[0.6]]])).float()
    logits = torch.from_numpy(np.where(rough, 6.0, -6.0)).float()
    found = (guided(logits, colours, (64, 64)) > 0).numpy()
    assert np.count_nonzero(rough != truth) > 350
    assert np.count_nonzero(found != truth) < 35


def test_without_colours_a_ragged_border_becomes_smooth_and_stays() -> None:
    rows, cols = np.mgrid[:48, :48]
    logits = torch.from_numpy(np.where(cols - 23.5 + (-1.0) ** rows < 0, 2.0, -2.0)).float()  # teeth of two cells
    found = guided(logits, torch.full((3, 48, 48), 0.5), (48, 48)) > 0
    edges = found.sum(1)
    assert set(edges.tolist()) <= {23, 24, 25}
    assert len(set(edges[2:-2].tolist())) == 1


def test_a_texture_that_explains_nothing_is_not_followed() -> None:
    colours = (torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float().expand(3, 64, 64)
    logits = torch.full((64, 64), -4.0)
    logits[:, 32:] = 4.0
    edges = (guided(logits, colours, (64, 64)) < 0).sum(1)
    assert (edges - 32).abs().max() <= 2 and (edges - 32).abs().float().mean() < 0.5


def test_far_from_the_border_nothing_changes_and_padding_has_no_part() -> None:
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(3, 40, 64, generator=generator)
    logits = torch.full((40, 64), -7.0)
    logits[:, 32:] = 7.0
    found = guided(logits, colours, (33, 64))
    assert torch.allclose(found[:, : 32 - REACH], torch.tensor(-CLIP), atol=1e-4)
    assert torch.allclose(found[:, 32 + REACH :], torch.tensor(CLIP), atol=1e-4)
    assert torch.equal(found[33:], found[32:33].expand(7, 64))
    logits[33:], colours[:, 33:] = 99.0, 99.0
    assert torch.equal(guided(logits, colours, (33, 64)), found)
