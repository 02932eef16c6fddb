from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from worker.head.fit import STRENGTHS, FitOptions, Pixels, best_strength, evidence, fit_linear
from worker.head.linear import LinearPosterior

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


def test_what_is_known_already_is_refined() -> None:
    """Between the head that is begun with and the data, the nearer to the latter the less the former counts."""
    made, _ = pixels(0.3, states=40)
    known = LinearPosterior(NAMES, torch.tensor([2.0, 0.5, -1.0]), 0.3 * torch.eye(3))
    alone = fit_linear(NAMES, made, FitOptions(effective=200)).mean

    def away(strength: float) -> float:
        found = fit_linear(NAMES, made, FitOptions(effective=200, strength=strength), start=known)
        return float((found.mean - alone).norm())

    assert away(1.0) < 0.15 < away(40.0) < away(4000.0)
    with pytest.raises(ValueError, match="best_strength"):
        fit_linear(NAMES, made, FitOptions(), start=known)


def test_other_images_let_the_known_head_count_less() -> None:
    made, _ = pixels(0.3, states=36)
    same = LinearPosterior(NAMES, torch.tensor([1.0, -0.5, 0.3]), torch.diag(torch.tensor([0.02, 0.3, 0.02])))
    other = replace(same, mean=torch.tensor([-0.5, 1.5, -2.0]))
    options = FitOptions(effective=200)
    assert best_strength(NAMES, made, options, same) == STRENGTHS[-1]
    assert best_strength(NAMES, made, options, other) == STRENGTHS[0]
    assert best_strength(NAMES, made.where(made.objects < 2), options, other) == STRENGTHS[-1], "too few to compare"


def test_evidence_is_the_integral_over_the_weights() -> None:
    made, _ = pixels(0.5, states=4, count=80)
    alone = Pixels(made.features[:, :, 1:2], made.labels, made.weights, made.objects, made.clicks)
    head = LinearPosterior(("channel_0",), torch.tensor([-0.4]), torch.tensor([[0.6]]))
    found = evidence(head, alone, FitOptions(effective=40))
    w = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    for state in range(4):
        logits = alone.features[state, :, 0].double()[:, None] * w
        sign = 2.0 * alone.labels[state].double()[:, None] - 1
        log_joint = 0.5 * torch.nn.functional.logsigmoid(sign * logits).sum(0)
        log_joint += torch.distributions.Normal(-0.4, 0.6).log_prob(w)
        wanted = torch.logsumexp(log_joint, 0) + torch.log(w[1] - w[0])
        assert float(found[state]) == pytest.approx(float(wanted), abs=0.05)
