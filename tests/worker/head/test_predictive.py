from __future__ import annotations

import numpy as np
import pytest
import torch

from worker.head import predictive


def dense(mean: float, variance: float) -> tuple[float, float]:
    """(E[p], BALD) by a brute-force float64 sum: 200,001 nodes over 12 standard deviations."""
    deviation = np.sqrt(variance)
    z = np.linspace(-12.0, 12.0, 200_001)
    weights = np.exp(-0.5 * z * z)
    weights /= weights.sum()
    logits = mean + deviation * z
    inside, outside = 1.0 / (1.0 + np.exp(-logits)), 1.0 / (1.0 + np.exp(logits))
    entropy = inside * np.logaddexp(0.0, -logits) + outside * np.logaddexp(0.0, logits)
    p, q = float(weights @ inside), float(weights @ outside)
    return p, -p * np.log(p) - q * np.log(q) - float(weights @ entropy)


GRID = [
    (m, v)
    for m in (-30.0, -17.3, -6.1, -2.0, -0.37, 0.0, 0.91, 3.3, 8.8, 21.0, 30.0)
    for v in (1e-4, 2.3e-3, 0.04, 0.3, 1.7, 9.0, 55.0, 310.0, 1e3)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_matches_dense_quadrature(dtype: torch.dtype) -> None:
    mean = torch.tensor([m for m, _ in GRID], dtype=dtype)
    variance = torch.tensor([v for _, v in GRID], dtype=dtype)
    expected = np.array([dense(m, v) for m, v in GRID])
    assert np.abs(predictive.bald(mean, variance).double().numpy() - expected[:, 1]).max() < 1e-3
    assert np.abs(predictive.probability(mean, variance).double().numpy() - expected[:, 0]).max() < 1e-3


def test_closed_form_at_random_points() -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack((rng.uniform(-30, 30, 300), np.exp(rng.uniform(np.log(1e-4), np.log(1e3), 300))))
    expected = np.array([dense(m, v)[1] for m, v in points])
    found = predictive.bald(torch.from_numpy(points[:, 0].copy()), torch.from_numpy(points[:, 1].copy())).numpy()
    assert np.abs(found - expected).max() < 1e-3


def test_quadrature_matches_dense_quadrature() -> None:
    for m, v in GRID:
        outside, expected_entropy = (float(part[0]) for part in predictive.quadrature(np.array([m]), v))
        information = -sum(t * np.log(t) for t in (outside, 1.0 - outside) if t > 0) - expected_entropy
        assert 1.0 - outside == pytest.approx(dense(m, v)[0], abs=1e-9)
        assert information == pytest.approx(dense(m, v)[1], abs=1e-9)


def test_tiny_variance_follows_the_first_order_expansion() -> None:
    mean, variance = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([1e-6, 0.0], dtype=torch.float64)
    assert predictive.bald(mean, variance)[0].item() == pytest.approx(0.125e-6, rel=1e-6)
    assert predictive.bald(mean, variance)[1].item() == 0.0


def test_symmetry_and_bounds() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = 20 * torch.randn(64, 64, generator=generator)
    variance = torch.exp(3 * torch.randn(64, 64, generator=generator))
    value = predictive.bald(mean, variance)
    assert torch.equal(value, predictive.bald(-mean, variance))
    assert value.min() >= 0 and value.max() <= np.log(2)
    assert (value <= predictive.entropy(mean, variance) + 1e-3).all()
    assert torch.allclose(
        predictive.probability(mean, variance) + predictive.probability(-mean, variance), torch.ones(1)
    )


def test_sampling_converges_to_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(2)
    mean = torch.tensor([0.0, 1.5, -4.0, 9.0], dtype=torch.float64)
    variance = torch.tensor([1.0, 25.0, 4.0, 100.0], dtype=torch.float64)
    exact = predictive.bald(mean, variance)
    errors = []
    for count in (100, 40_000):
        draws = predictive.sample_logits(mean, variance, count, generator=generator)
        errors.append((predictive.bald_of_samples(draws) - exact).abs().max().item())
    assert errors[1] < 5e-3
    assert errors[1] < errors[0]


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="two samples"):
        predictive.bald_of_samples(torch.zeros(1, 4))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        predictive.bald(torch.zeros(3), torch.ones(4))


def test_expected_iou_is_that_of_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(40, 40, generator=generator)
    mask = probability > 0.4
    draws = torch.rand(2000, 40, 40, generator=generator) < probability
    both, either = (draws & mask).sum((1, 2)), (draws | mask).sum((1, 2))
    assert predictive.expected_iou(probability, mask) == pytest.approx(float((both / either).mean()), abs=2e-3)
    assert predictive.expected_iou(probability, torch.zeros_like(mask)) == 0.0
    assert predictive.expected_iou(torch.zeros(3), torch.zeros(3, dtype=torch.bool)) == 0.0
