from __future__ import annotations

import torch

from worker.head.fit import FitOptions, Pixels, fit_linear

NAMES = ("logit", "channel_0", "bias")


def pixels(spread: float, *, states: int = 300, count: int = 200, seed: int = 0) -> tuple[Pixels, torch.Tensor]:
    """States whose weights are drawn around (1, -0.5, 0.3) with a deviation on `channel_0` only."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.cat([2 * torch.randn(states, count, 2, generator=generator), torch.ones(states, count, 1)], dim=2)
    weights = torch.tensor([1.0, -0.5, 0.3]).repeat(states, 1)
    weights[:, 1] += spread * torch.randn(states, generator=generator)
    logits = torch.einsum("gnd,gd->gn", features, weights)
    labels = torch.rand(logits.shape, generator=generator) < torch.sigmoid(logits)
    made = Pixels(features, labels, torch.ones(states, count), torch.arange(states), torch.ones(states))
    return made, weights


def test_population_is_recovered() -> None:
    torch.set_num_threads(2)
    made, _ = pixels(0.8)
    found = fit_linear(NAMES, made, FitOptions(effective=200, rounds=20))
    deviations = found.covariance.diag().sqrt()
    assert torch.allclose(found.mean, torch.tensor([1.0, -0.5, 0.3]), atol=0.12)
    assert abs(float(deviations[1]) - 0.8) < 0.12
    assert deviations[0] < 0.3 and deviations[2] < 0.3


def test_alike_objects_leave_little_to_disagree_about() -> None:
    made, _ = pixels(0.0)
    found = fit_linear(NAMES, made, FitOptions(effective=200, rounds=20))
    assert (found.covariance.diag().sqrt() < 0.25).all()


def test_weights_undo_the_sampling() -> None:
    """Twice the pixels at half the weight are the same data."""
    made, _ = pixels(0.5, states=60, count=100)
    doubled = Pixels(
        torch.cat([made.features, made.features], 1),
        torch.cat([made.labels, made.labels], 1),
        torch.ones(60, 200),
        made.objects,
        made.clicks,
    )
    one, two = (fit_linear(NAMES, data, FitOptions(rounds=3)) for data in (made, doubled))
    assert torch.allclose(one.mean, two.mean, atol=1e-4)
    assert torch.allclose(one.covariance, two.covariance, atol=1e-4)
