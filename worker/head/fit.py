"""Fit the linear head: weights that are best for all objects, and how far single objects differ from them.

A posterior over the *common* weights shrinks to nothing with the number of training objects, and with it every
disagreement. What matters for the object at hand is how much *its* best weights may differ. So each training state g
has its own weights w_g ~ N(mu, S), and mu and S are estimated from all states (empirical Bayes: EM with a Laplace
approximation of each w_g). N(mu, S) is then the prior of a new object, to be conditioned on its clicks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from worker.head.linear import LinearPosterior
from worker.preemption import give_way

#: Much to learn from the images at hand, or little.
STRENGTHS = (10.0, 40.0, 150.0, 600.0, 2500.0)
#: How strengths are compared: parts that the objects are divided into, rounds of a fit, states at most.
FOLDS = 3
ROUNDS_COMPARED = 6
STATES_COMPARED = 400


@dataclass
class Pixels:
    """Labelled pixels grouped by state.

    features: (G, n, d) float32; labels: (G, n) bool; weights: (G, n), mean 1 in each state; objects: (G,) int64, which
    object each state belongs to; clicks: (G,) int64, how many clicks had been made; names: of the objects, by number.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor
    objects: Tensor
    clicks: Tensor
    names: list[str] = field(default_factory=list)

    def where(self, states: Tensor) -> Pixels:
        """The states for which `states` (G,) bool is true; objects keep their numbers."""
        return replace(
            self,
            features=self.features[states],
            labels=self.labels[states],
            weights=self.weights[states],
            objects=self.objects[states],
            clicks=self.clicks[states],
        )


@dataclass(frozen=True)
class FitOptions:
    """`effective`: how many independent pixels a state's worth of pixels counts as (neighbours say the same thing).

    `ridge`: precision of the Gaussian around SAM that keeps mu bounded, for standardised features. `strength`: how many
    states the head that is begun with, if any, counts as; None: to be chosen by `best_strength`.
    """

    effective: float = 40.0
    ridge: float = 1.0
    strength: float | None = None
    rounds: int = 12
    newton: int = 6


def fit_linear(
    names: tuple[str, ...], pixels: Pixels, options: FitOptions, *, start: LinearPosterior | None = None
) -> LinearPosterior:
    """N(mu, S) of the weights of one object's head, for `pixels` of many states.

    `start`: what is known already, from other images: it enters as if `options.strength` states had been seen with this
    mean and covariance (the conjugate normal-inverse-Wishart prior), so a few images refine it and many outweigh it.
    Raises ValueError if that number is None then.
    """
    scale = _scale(pixels)
    features, target, weights = _standardised(pixels, scale, options)
    d = features.shape[2]
    if start is None:
        sam = torch.zeros(d, dtype=torch.float64)
        sam[names.index("logit")] = scale[names.index("logit")]
        seen, before = 0.0, sam
        spread = torch.eye(d, dtype=torch.float64) * 0.25
    else:
        if options.strength is None:
            raise ValueError("How much the head that is begun with counts must be known: see `best_strength`.")
        seen, before = options.strength, start.mean.double() * scale
        spread = start.covariance.double() * scale[:, None] * scale
    known = spread
    # Not from `before`: a narrow covariance holds each state's weights to mu, and mu would get away from it slowly.
    mu = _common(features, target, weights, before, options.ridge)
    identity = torch.eye(d, dtype=torch.float64)
    modes = mu.expand(len(features), d).clone()
    for _ in range(options.rounds):
        precision = torch.linalg.inv(spread + 1e-9 * identity)
        modes, hessians = _modes(features, target, weights, mu, precision, modes, options.newton)
        mu = (modes.sum(0) + seen * before) / (len(modes) + seen)
        centred = modes - mu
        spread = centred.T @ centred + torch.linalg.inv(hessians).sum(0)
        spread = (spread + seen * (known + torch.outer(before - mu, before - mu))) / (len(modes) + seen)
    factor = torch.linalg.cholesky(spread + 1e-9 * identity)
    return LinearPosterior(names, (mu / scale).float(), (factor / scale[:, None]).float())


def best_strength(names: tuple[str, ...], pixels: Pixels, options: FitOptions, start: LinearPosterior) -> float:
    """The strength of `start` with which a fit to some objects predicts the others best (cross-validation).

    Where these images are like those that `start` knows, that is a large one; where they are of another kind, a small.
    """
    objects = torch.unique(pixels.objects)
    states_each = len(pixels.objects) / len(objects)
    kept = objects[:: max(1, math.ceil(len(objects) * states_each / STATES_COMPARED))]
    fold_of = {int(one): number % FOLDS for number, one in enumerate(kept)}
    folds = torch.tensor([fold_of.get(int(one), -1) for one in pixels.objects])
    if len(kept) < FOLDS:
        return STRENGTHS[-1]
    sums = dict.fromkeys(STRENGTHS, 0.0)
    for fold in range(FOLDS):
        learnt, apart = pixels.where((folds >= 0) & (folds != fold)), pixels.where(folds == fold)
        for strength in STRENGTHS:
            tried = replace(options, strength=strength, rounds=ROUNDS_COMPARED)
            sums[strength] += float(evidence(fit_linear(names, learnt, tried, start=start), apart, options).sum())
    return max(sums, key=lambda strength: sums[strength])


def evidence(head: LinearPosterior, pixels: Pixels, options: FitOptions) -> Tensor:
    """log p(labels of a state | N(mean, covariance) of its weights), by Laplace's method: (G,) float64."""
    scale = _scale(pixels)
    features, target, weights = _standardised(pixels, scale, options)
    mu = head.mean.double() * scale
    factor = head.factor.double() * scale[:, None]
    precision = torch.linalg.inv(factor @ factor.T + 1e-9 * torch.eye(len(mu), dtype=torch.float64))
    modes, hessians = _modes(features, target, weights, mu, precision, mu.expand(len(features), -1), 2 * options.newton)
    logits = torch.einsum("gnd,gd->gn", features, modes)
    likelihood = (weights * torch.nn.functional.logsigmoid((2 * target - 1) * logits)).sum(1)
    away = modes - mu
    prior = 0.5 * (torch.linalg.slogdet(precision).logabsdet - (away @ precision * away).sum(1))
    found: Tensor = likelihood + prior - 0.5 * torch.linalg.slogdet(hessians).logabsdet
    return found


def _scale(pixels: Pixels) -> Tensor:
    """Root mean square of each feature, (d,) float64."""
    return pixels.features.flatten(0, 1).double().square().mean(0).sqrt().clamp(min=1e-3)


def _standardised(pixels: Pixels, scale: Tensor, options: FitOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Features (G, n, d) over `scale`, labels (G, n) 0 or 1, weights (G, n) of sum `options.effective`; float64."""
    features = (pixels.features / scale.float()).double()
    weights = pixels.weights.double() * (options.effective / pixels.features.shape[1])
    return features, pixels.labels.double(), weights


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
    """Laplace approximation of every state's weights: modes (G, d) and precisions (G, d, d), batched Newton."""
    modes = start.clone()
    for _ in range(steps):
        give_way()
        inside = torch.sigmoid(torch.einsum("gnd,gd->gn", features, modes))
        gradient = torch.einsum("gnd,gn->gd", features, weights * (inside - target)) + (modes - mu) @ precision
        curvature = (weights * inside * (1 - inside)).unsqueeze(2)
        hessian = features.transpose(1, 2) @ (features * curvature) + precision
        step = torch.linalg.solve(hessian, gradient)
        modes = modes - step / (step.norm(dim=1, keepdim=True) / 3.0).clamp(min=1.0)
    return modes, hessian
