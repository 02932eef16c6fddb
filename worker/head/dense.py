"""The slow way to a Laplace posterior: every row's curvature in float64, summed, inverted. What others are held to."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap

from worker.head.posterior import Curvature, Flavour, LaplacePosterior, Structure


def dense_covariance(
    posterior: LaplacePosterior, rows: Tensor, labels: Tensor, flavour: Flavour, *, effective: float | None = None
) -> Tensor:
    """(P, P) float64: what `posterior.covariance` should be for rows (N, k) and labels (N,).

    Takes mode, uncertain weights and prior precision from `posterior`. Kronecker factors have the full structure as
    reference, which they only approximate.
    """
    network = copy.deepcopy(posterior.network).double().requires_grad_(False)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters() if name in posterior.names}

    def logit(given: dict[str, Tensor], row: Tensor) -> Tensor:
        value: Tensor = functional_call(network, given, (row[None],))
        return value[0, 0]

    def loss(given: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logit(given, row), label)

    inputs, target = rows.double(), labels.double()
    if flavour.curvature is Curvature.HESSIAN:
        blocks = vmap(hessian(loss), in_dims=(None, 0, 0))(weights, inputs, target)
        lines = [
            torch.cat(
                [blocks[a][b].sum(0).reshape(weights[a].numel(), weights[b].numel()) for b in posterior.names], dim=1
            )
            for a in posterior.names
        ]
        total = torch.cat(lines)
    else:
        slopes = vmap(grad(logit), in_dims=(None, 0))(weights, inputs)
        jacobian = torch.cat([slopes[name].flatten(1) for name in posterior.names], dim=1)
        with torch.no_grad():
            inside = torch.sigmoid(network(inputs)[:, 0])
        factor = inside * (1 - inside) if flavour.curvature is Curvature.GGN else (inside - target) ** 2
        total = jacobian.T @ (jacobian * factor[:, None])
    if flavour.structure is Structure.DIAG:
        total = torch.diag(total.diag())
    temperature = 1.0 if effective is None else len(rows) / effective
    precision = total / temperature + torch.diag(posterior.prior_precision.double())
    uncertain = posterior.root.abs().sum(1) > 0
    covariance = torch.zeros_like(precision)
    where = uncertain.nonzero()[:, 0]
    covariance[where[:, None], where] = torch.linalg.inv(precision[where[:, None], where])
    return covariance


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((found.double() - expected).norm() / expected.norm())
