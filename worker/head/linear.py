"""A Gaussian over the weights of a linear head: its Laplace posterior, and all that proposals need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Most Newton steps when a session's clicks are taken in; the objective is convex and a few do.
_NEWTON_STEPS = 25
#: A click is a decision about a place, not one noisy pixel: its likelihood counts as this many agreeing pixels.
CLICK_WEIGHT = 4.0

#: Standard deviations of the prior centred on SAM, by feature. Products h_c U_c and logits are in logits already, so
#: theirs say by which fraction a plausible head may re-weight SAM.
_PRIOR_DEVIATIONS = {
    "logit": 0.2,
    "channel": 0.2,
    "squashed": 0.3,
    "blur": 0.1,
    "candidate": 0.25,
    "near_positive": 1.0,
    "near_negative": 1.0,
    "bias": 0.5,
}


@dataclass(frozen=True)
class LinearPosterior:
    """w ~ N(mean, factor factor'): `mean` (d,), `factor` (d, r) float32, for the d features called `names`."""

    names: tuple[str, ...]
    mean: Tensor
    factor: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != (len(self.names),) or self.factor.shape[0] != len(self.names):
            raise ValueError(
                f"A head of {len(self.names)} features cannot have a mean of {tuple(self.mean.shape)} and a covariance "
                f"factor of {tuple(self.factor.shape)}."
            )

    @property
    def covariance(self) -> Tensor:
        """(d, d)."""
        return self.factor @ self.factor.T

    def to(self, device: torch.device) -> LinearPosterior:
        return LinearPosterior(self.names, self.mean.to(device), self.factor.to(device))

    def logit_mean(self, features: Tensor) -> Tensor:
        """E[f] for features (d, ...): shape (...)."""
        return (self.mean @ features.reshape(len(self.names), -1)).view(features.shape[1:])

    def whitened(self, features: Tensor) -> Tensor:
        """g = factor' phi for features (d, ...): (r, ...). Cov(f(x), f(y)) = <g(x), g(y)>, Var f(x) = |g(x)|^2."""
        return (self.factor.T @ features.reshape(len(self.names), -1)).view(-1, *features.shape[1:])

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the logit for features (d, ...), each of shape (...)."""
        return self.logit_mean(features), self.whitened(features).square().sum(0)

    def extended(self, names: tuple[str, ...], deviation: float) -> LinearPosterior:
        """This posterior with further features, whose weights are independent: N(0, deviation^2)."""
        more = len(names)
        rows, columns = self.factor.shape
        factor = self.factor.new_zeros(rows + more, columns + more)
        factor[:rows, :columns] = self.factor
        factor[rows:, columns:].fill_diagonal_(deviation)
        return LinearPosterior((*self.names, *names), torch.cat([self.mean, self.mean.new_zeros(more)]), factor)

    def conditioned(self, features: Tensor, labels: Tensor, *, weight: float = CLICK_WEIGHT) -> LinearPosterior:
        """The Laplace posterior after k labelled pixels, this one being the prior.

        Args:
            features: (k, d) features of the pixels.
            labels: (k,) bool, True = inside.
            weight: how many agreeing observations each label counts as.

        The mode of prod sigmoid(s_i f_i)^weight N(w) is found by Newton's method in whitened coordinates
        w = mean + factor z, z ~ N(0, I), where the Hessian is I + weight Z' diag(p (1 - p)) Z.
        """
        if len(labels) == 0:
            return self
        # On the processor: each step looks at a loss, and a GPU would have to be waited for each time.
        design = (features @ self.factor).cpu().double()
        offset = (features @ self.mean).cpu().double()
        sign = 2.0 * labels.cpu().double() - 1.0
        identity = torch.eye(design.shape[1], dtype=torch.float64)

        def loss(z: Tensor) -> float:
            return float(0.5 * z @ z - weight * F.logsigmoid(sign * (offset + design @ z)).sum())

        def hessian(z: Tensor) -> Tensor:
            inside = torch.sigmoid(offset + design @ z)
            return identity + weight * (design.T * (inside * (1.0 - inside))) @ design

        z = torch.zeros(design.shape[1], dtype=torch.float64)
        current = loss(z)
        for _ in range(_NEWTON_STEPS):
            gradient = z - weight * design.T @ (sign * torch.sigmoid(-sign * (offset + design @ z)))
            step = torch.linalg.solve(hessian(z), gradient)
            # Far from the mode the logistic curvature vanishes and a full step overshoots: halve it until it helps.
            size = 1.0
            while size > 1e-3 and loss(z - size * step) > current:
                size /= 2.0
            z = z - size * step
            previous, current = current, loss(z)
            if previous - current < 1e-9:
                break
        root = torch.linalg.cholesky(hessian(z))
        inverse_root = torch.linalg.solve_triangular(root, identity, upper=False).T
        return LinearPosterior(
            self.names, self.mean + self.factor @ z.to(self.factor), self.factor @ inverse_root.to(self.factor)
        )


def sam_centred(names: tuple[str, ...]) -> LinearPosterior:
    """The prior for a backbone without a trained head: mean SAM itself, independent weights around it.

    Raises KeyError for a feature without a prior deviation.
    """
    mean = torch.tensor([1.0 if name == "logit" else 0.0 for name in names])
    deviations = [_PRIOR_DEVIATIONS[name.rstrip("0123456789").rstrip("_")] for name in names]
    return LinearPosterior(names, mean, torch.diag(torch.tensor(deviations)))
