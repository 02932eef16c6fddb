from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize

from worker.head.features import feature_names
from worker.head.linear import LinearPosterior, sam_centred


def small(seed: int = 0, d: int = 5, r: int = 5) -> LinearPosterior:
    generator = torch.Generator().manual_seed(seed)
    return LinearPosterior(
        tuple(f"f{i}" for i in range(d)),
        torch.randn(d, generator=generator),
        0.7 * torch.randn(d, r, generator=generator),
    )


def test_moments_match_dense_algebra() -> None:
    posterior = small()
    features = torch.randn(5, 3, 4)
    mean, variance = posterior.moments(features)
    flat = features.reshape(5, -1).double()
    dense = posterior.factor.double() @ posterior.factor.double().T
    assert torch.allclose(mean.flatten().double(), posterior.mean.double() @ flat, atol=1e-5)
    assert torch.allclose(variance.flatten().double(), (flat * (dense @ flat)).sum(0), atol=1e-4)
    assert mean.shape == variance.shape == (3, 4)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_conditioning_matches_a_dense_float64_reference(weight: float) -> None:
    prior = small()
    generator = torch.Generator().manual_seed(3)
    clicks = 2 * torch.randn(4, 5, generator=generator)
    labels = torch.tensor([True, False, True, True])
    found = prior.conditioned(clicks, labels, weight=weight)

    covariance = (prior.factor.double() @ prior.factor.double().T).numpy()
    mean, phi, sign = prior.mean.double().numpy(), clicks.double().numpy(), 2.0 * labels.double().numpy() - 1.0

    def loss(w: object) -> float:
        difference = torch.as_tensor(w) - torch.as_tensor(mean)
        quadratic = 0.5 * difference @ torch.linalg.solve(torch.as_tensor(covariance), difference)
        margins = torch.as_tensor(sign * (phi @ w))
        return float(quadratic + weight * torch.nn.functional.softplus(-margins).sum())

    mode = torch.as_tensor(minimize(loss, mean, method="BFGS", options={"gtol": 1e-8}).x)
    inside = torch.sigmoid(torch.as_tensor(phi) @ mode)
    precision = torch.linalg.inv(torch.as_tensor(covariance))
    precision += weight * (torch.as_tensor(phi).T * (inside * (1 - inside))) @ torch.as_tensor(phi)
    assert torch.allclose(found.mean.double(), mode, atol=2e-3)
    assert torch.allclose(found.covariance.double(), torch.linalg.inv(precision), atol=2e-3)


def test_conditioning_on_nothing_changes_nothing() -> None:
    prior = small()
    assert prior.conditioned(torch.zeros(0, 5), torch.zeros(0, dtype=torch.bool)) is prior


def test_contradictory_extreme_clicks_stay_finite() -> None:
    prior = small()
    click = torch.full((1, 5), 50.0)
    found = prior.conditioned(torch.cat([click, click, -click]), torch.tensor([True, False, True]))
    assert torch.isfinite(found.mean).all() and torch.isfinite(found.factor).all()


def test_a_click_moves_its_pixel_to_its_side() -> None:
    names = feature_names(16)
    prior = sam_centred(names)
    phi = torch.zeros(len(names))
    phi[0], phi[names.index("near_positive_0")], phi[-1] = -3.0, 1.0, 1.0
    before = prior.logit_mean(phi)
    after = prior.conditioned(phi[None], torch.tensor([True])).logit_mean(phi)
    assert before < 0 < after


def test_sam_is_the_mean_of_the_prior() -> None:
    names = feature_names(32)
    features = torch.randn(len(names), 6, 6)
    assert torch.equal(sam_centred(names).logit_mean(features), features[0])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="cannot have a mean"):
        LinearPosterior(("a", "b"), torch.zeros(3), torch.zeros(2, 2))
