"""Fit the linear head: weights that are best for all objects, and how far single objects differ from them.

A posterior over the *common* weights shrinks to nothing with the number of training objects, and with it every
disagreement. What matters for the object at hand is how much *its* best weights may differ. So each training state g
has its own weights w_g ~ N(mu, S), and mu and S are estimated from all states (empirical Bayes: EM with a Laplace
approximation of each w_g). N(mu, S) is then the prior of a new object, to be conditioned on its clicks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from worker.head.linear import LinearPosterior
from worker.preemption import give_way


@dataclass
class Pixels:
    """Labelled pixels grouped by state.

    features: (G, n, d) float32; labels: (G, n) bool; weights: (G, n), mean 1 in each state; objects: (G,) int64, which
    object each state belongs to; clicks: (G,) int64, how many clicks had been made.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor
    objects: Tensor
    clicks: Tensor
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FitOptions:
    """`effective`: how many independent pixels a state's worth of pixels counts as (neighbours say the same thing).

    `ridge`: precision of the Gaussian around SAM that keeps mu bounded, for standardised features. `strength`: how many
    states the head that is begun with, if any, counts as.
    """

    effective: float = 40.0
    ridge: float = 1.0
    strength: float = 400.0
    rounds: int = 12
    newton: int = 6


def fit_linear(
    names: tuple[str, ...], pixels: Pixels, options: FitOptions, *, start: LinearPosterior | None = None
) -> LinearPosterior:
    """N(mu, S) of the weights of one object's head, for `pixels` of many states.

    `start`: what is known already, from other images: it enters as if `options.strength` states had been seen with this
    mean and covariance (the conjugate normal-inverse-Wishart prior), so a few images refine it and many outweigh it.
    """
    scale = pixels.features.flatten(0, 1).double().square().mean(0).sqrt().clamp(min=1e-3)
    features = (pixels.features / scale.float()).double()
    target = pixels.labels.double()
    weights = pixels.weights.double() * (options.effective / pixels.features.shape[1])
    d = features.shape[2]
    sam = torch.zeros(d, dtype=torch.float64)
    sam[names.index("logit")] = scale[names.index("logit")]
    seen, before = 0.0, torch.zeros(d, dtype=torch.float64)
    if start is None:
        mu = _common(features, target, weights, sam, options.ridge)
        spread = torch.eye(d, dtype=torch.float64) * 0.25
    else:
        seen, before = options.strength, start.mean.double() * scale
        mu, spread = before, start.covariance.double() * scale[:, None] * scale
    known = spread
    identity = torch.eye(d, dtype=torch.float64)
    modes = mu.expand(len(features), d).clone()
    for _ in range(options.rounds):
        precision = torch.linalg.inv(spread + 1e-9 * identity)
        modes, covariances = _modes(features, target, weights, mu, precision, modes, options.newton)
        mu = (modes.sum(0) + seen * before) / (len(modes) + seen)
        centred = modes - mu
        spread = centred.T @ centred + covariances.sum(0) + seen * (known + torch.outer(before - mu, before - mu))
        spread = spread / (len(modes) + seen)
    factor = torch.linalg.cholesky(spread + 1e-9 * identity)
    return LinearPosterior(names, (mu / scale).float(), (factor / scale[:, None]).float())


def _common(features: Tensor, target: Tensor, weights: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """The mode of one weight vector for all states, around `prior`, by Newton's method with step halving."""
    flat, labels, w = features.flatten(0, 1), target.flatten(), weights.flatten()
    identity = torch.eye(flat.shape[1], dtype=torch.float64)
    sign = 2 * labels - 1

    def loss(mu: Tensor) -> float:
        return float(
            -(w * torch.nn.functional.logsigmoid(sign * (flat @ mu))).sum() + 0.5 * ridge * (mu - prior).square().sum()
        )

    mu = prior.clone()
    current = loss(mu)
    for _ in range(30):
        give_way()
        inside = torch.sigmoid(flat @ mu)
        gradient = flat.T @ (w * (inside - labels)) + ridge * (mu - prior)
        hessian = (flat.T * (w * inside * (1 - inside))) @ flat + ridge * identity
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-4 and loss(mu - size * step) > current:
            size /= 2
        mu = mu - size * step
        previous, current = current, loss(mu)
        if previous - current < 1e-7 * abs(previous):
            break
    return mu


def _modes(
    features: Tensor, target: Tensor, weights: Tensor, mu: Tensor, precision: Tensor, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Laplace approximation of every state's weights: modes (G, d) and covariances (G, d, d), batched Newton."""
    modes = start.clone()
    for _ in range(steps):
        give_way()
        inside = torch.sigmoid(torch.einsum("gnd,gd->gn", features, modes))
        gradient = torch.einsum("gnd,gn->gd", features, weights * (inside - target)) + (modes - mu) @ precision
        curvature = (weights * inside * (1 - inside)).unsqueeze(2)
        hessian = features.transpose(1, 2) @ (features * curvature) + precision
        step = torch.linalg.solve(hessian, gradient)
        modes = modes - step / (step.norm(dim=1, keepdim=True) / 3.0).clamp(min=1.0)
    return modes, torch.linalg.inv(hessian)
