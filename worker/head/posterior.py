"""Laplace posteriors of head networks by laplace-torch, as plain tensors.

What laplace-torch gets silently wrong for a binary logit is refused or avoided here: a single output (zero Hessian) by
the [0, f] outputs of `TwoLogits`, last-layer posteriors with unfit back ends by fitting the last layer on its inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp, vmap
from torch.utils.data import DataLoader, TensorDataset

from worker.head import predictive
from worker.head.network import TwoLogits

#: Which part of the weights a subnetwork has.
SUBNETWORK_SHARE = 0.25
#: Prior precisions that are tried on held-out pixels.
HELD_OUT_PRECISIONS = tuple(10.0**power for power in range(-2, 5))


class Subset(StrEnum):
    """Which weights are uncertain. `subnetwork`: the quarter with the largest magnitude, biases among them."""

    ALL = "all"
    LAST_LAYER = "last_layer"
    SUBNETWORK = "subnetwork"


class Structure(StrEnum):
    """How much of the Hessian is kept. `full` and `diag` are exact; `kron` approximates, layer by layer."""

    FULL = "full"
    KRON = "kron"
    DIAG = "diag"


class Curvature(StrEnum):
    """`ggn`: generalised Gauss-Newton; `ef`: empirical Fisher; `hessian`: the Hessian itself (full only)."""

    GGN = "ggn"
    EF = "ef"
    HESSIAN = "hessian"


class Prior(StrEnum):
    """How the prior's precision is chosen: as given; by marginal likelihood, one for all weights or one for each
    parameter tensor; or by the likelihood of held-out pixels."""

    FIXED = "fixed"
    MARGINAL = "marginal"
    MARGINAL_LAYERS = "marginal_layers"
    HELD_OUT = "held_out"


@dataclass(frozen=True)
class Flavour:
    """One Laplace configuration. Raises ValueError for those that cannot be trusted."""

    subset: Subset = Subset.ALL
    structure: Structure = Structure.FULL
    curvature: Curvature = Curvature.GGN
    prior: Prior = Prior.FIXED

    def __post_init__(self) -> None:
        if self.curvature not in set(Curvature):
            raise ValueError(
                f"The curvature {str(self.curvature)!r} is not offered (Monte-Carlo Fisher is biased by up to 22 % in "
                f"its trace at 20,000 pixels). Choose ggn, ef or hessian."
            )
        if self.structure not in set(Structure):
            raise ValueError(
                f"The Hessian structure {str(self.structure)!r} is not offered (a low-rank one needs a package that is "
                f"not installable). Choose full, kron or diag."
            )
        if self.curvature is Curvature.HESSIAN and self.structure is not Structure.FULL:
            raise ValueError("The exact Hessian exists with the full structure only. Choose full, or ggn.")
        if self.subset is Subset.SUBNETWORK and self.structure is Structure.KRON:
            raise ValueError("Kronecker factors belong to whole layers, not to a subnetwork. Choose full or diag.")
        if self.subset is Subset.SUBNETWORK and self.prior in (Prior.MARGINAL, Prior.MARGINAL_LAYERS):
            raise ValueError("The marginal likelihood would be that of all weights. Choose fixed or held_out.")


@dataclass(frozen=True)
class LaplacePosterior:
    """N(mean, root root') over the uncertain weights of `network` (flattened, in order of `names`).

    network: (N, k) -> (N, 1), at its mode; mean: (P,); root: (P, r) float32, a row of zeros for a weight that is
    certain; prior_precision: (P,), as chosen.
    """

    network: nn.Module
    names: tuple[str, ...]
    mean: Tensor
    root: Tensor
    prior_precision: Tensor

    @property
    def covariance(self) -> Tensor:
        """(P, P)."""
        return self.root @ self.root.T

    def logit_samples(
        self, rows: Tensor, count: int, *, linearised: bool = True, generator: torch.Generator | None = None
    ) -> Tensor:
        """`count` draws of the logits of rows (N, k): (count, N).

        `linearised`: through the network's first-order expansion at the mode, for which the Laplace posterior is a
        Gaussian over functions (Immer et al. 2021, arXiv 2008.08400); else through the network itself.
        """
        noise = torch.randn((count, self.root.shape[1]), generator=generator).to(self.mean.device)
        deviations = noise @ self.root.T
        centre = self._split(self.mean)

        def output(weights: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(self.network, weights, (rows,))
            return logits[:, 0]

        draws = []
        for deviation in deviations:
            if linearised:
                forward = jvp(output, (centre,), (self._split(deviation),))
                draws.append(forward[0] + forward[1])
            else:
                draws.append(output(self._split(self.mean + deviation)))
        return torch.stack(draws).detach()

    def logit_moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (N,) of the logits of rows (N, k), through the first-order expansion at the mode."""

        def output(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            logit: Tensor = functional_call(self.network, weights, (row[None],))
            return logit[0, 0]

        slopes, logits = vmap(grad_and_value(output), in_dims=(None, 0))(self._split(self.mean), rows)
        jacobian = torch.cat([slopes[name].flatten(1) for name in self.names], dim=1)
        return logits.detach(), (jacobian @ self.root).square().sum(1).detach()

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        shapes = dict(self.network.named_parameters())
        sizes = [shapes[name].numel() for name in self.names]
        parts = torch.split(flat, sizes)
        return {name: part.view(shapes[name].shape) for name, part in zip(self.names, parts, strict=True)}


def fit_laplace(
    network: nn.Sequential,
    rows: Tensor,
    labels: Tensor,
    flavour: Flavour | None = None,
    *,
    prior_precision: float = 1.0,
    effective: float | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
) -> LaplacePosterior:
    """The Laplace posterior of `network`, which must be at its mode.

    Args:
        network: (N, k) -> (N, 1), ending in a Linear layer of one output.
        rows: (N, k) float32.
        labels: (N,) bool.
        flavour: which weights, how much of which curvature, and how the prior is chosen.
        prior_precision: of the isotropic Gaussian prior; where it is tuned, the start.
        effective: how many independent observations the rows count as; None: all of them. Pixels of one object
            repeat each other; counting each collapses the posterior.
        held_out: rows and labels of other objects, for `Prior.HELD_OUT`.

    Raises ValueError for empty or single-class data, whose Hessian says nothing.
    """
    flavour = flavour or Flavour()
    if len(rows) == 0 or bool(labels.all()) or not bool(labels.any()):
        raise ValueError("A posterior needs pixels from inside and from outside. Give more images.")
    last = network[-1]
    if not isinstance(last, nn.Linear) or last.out_features != 1:
        raise ValueError("A head network must end in a Linear layer with one output.")
    part, inputs, prefix = network, rows, ""
    if flavour.subset is Subset.LAST_LAYER:
        with torch.no_grad():
            inputs = network[:-1](rows) if len(network) > 1 else rows
        part, prefix = nn.Sequential(last), f"{len(network) - 1}."
    laplace = _fitted(part, inputs, labels, flavour, prior_precision, effective)
    local = [name for name, _ in part.named_parameters()]
    names = tuple(f"{prefix}{name[2:]}" if prefix else name for name in local)
    parameters = dict(network.named_parameters())
    sizes = [parameters[name].numel() for name in names]
    mean = torch.cat([parameters[name].detach().flatten() for name in names])
    uncertain = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
    if flavour.subset is Subset.SUBNETWORK:
        uncertain = mean.abs() >= mean.abs().quantile(1.0 - SUBNETWORK_SHARE)

    def posterior() -> LaplacePosterior:
        precision = laplace.posterior_precision
        if flavour.structure is Structure.KRON:
            precision = precision.to_matrix()
        dense = torch.diag(precision) if precision.ndim == 1 else precision
        # A weight that is certain is left out of the precision, not of the covariance: it is conditioned on.
        root = torch.zeros(len(mean), int(uncertain.sum()), device=mean.device)
        root[uncertain] = _root_of_inverse(dense[uncertain][:, uncertain])
        return LaplacePosterior(network, names, mean, root, _each_weight(laplace.prior_precision, sizes))

    if flavour.prior in (Prior.MARGINAL, Prior.MARGINAL_LAYERS):
        structure = "scalar" if flavour.prior is Prior.MARGINAL else "layerwise"
        with warnings.catch_warnings():
            # About a link function, which the marginal likelihood does not use.
            warnings.filterwarnings("ignore", message="By default `link_approx`", category=UserWarning)
            laplace.optimize_prior_precision("glm", method="marglik", prior_structure=structure, n_steps=200)
    if flavour.prior is not Prior.HELD_OUT:
        return posterior()
    if held_out is None:
        raise ValueError("Give held-out pixels, or choose another way to tune the prior.")
    tried = []
    for precision in HELD_OUT_PRECISIONS:
        laplace.prior_precision = precision
        found = posterior()
        tried.append((_cross_entropy(*found.logit_moments(held_out[0]), held_out[1]), found))
    return min(tried, key=lambda pair: pair[0])[1]


def _fitted(
    part: nn.Sequential,
    inputs: Tensor,
    labels: Tensor,
    flavour: Flavour,
    prior_precision: float,
    effective: float | None,
) -> Any:
    """laplace-torch's object for all weights of `part`."""
    from laplace import Laplace
    from laplace.curvature import AsdlEF, AsdlGGN, AsdlHessian

    backend = {Curvature.GGN: AsdlGGN, Curvature.EF: AsdlEF, Curvature.HESSIAN: AsdlHessian}[flavour.curvature]
    laplace = Laplace(
        nn.Sequential(*part, TwoLogits().to(inputs.device)),
        "classification",
        subset_of_weights="all",
        hessian_structure=flavour.structure.value,
        backend=backend,
        prior_precision=prior_precision,
        temperature=1.0 if effective is None else len(inputs) / effective,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about how the curvature back end hooks modules
        laplace.fit(DataLoader(TensorDataset(inputs, labels.long()), batch_size=4096))
    return laplace


def _each_weight(precision: Tensor, sizes: list[int]) -> Tensor:
    """(P,) from one precision, one for each parameter tensor, or one for each weight."""
    given = precision.detach().flatten()
    if given.numel() == len(sizes) and len(sizes) > 1:
        return torch.cat([value.expand(size) for value, size in zip(given, sizes, strict=True)])
    return given.expand(sum(sizes)).clone()


def _cross_entropy(mean: Tensor, variance: Tensor, labels: Tensor) -> float:
    inside = predictive.probability(mean, variance).clamp(1e-7, 1 - 1e-7)
    return float(nn.functional.binary_cross_entropy(inside, labels.float()))


def _root_of_inverse(precision: Tensor) -> Tensor:
    """R with R R' = precision^-1. Raises ValueError where the precision is not positive (a Hessian off a mode)."""
    lower, info = torch.linalg.cholesky_ex(precision.detach().double())
    if int(info) != 0:
        raise ValueError("The curvature is not positive here. Use ggn, or train the head to its mode first.")
    identity = torch.eye(len(precision), dtype=torch.float64, device=precision.device)
    root: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).T
    return root.float().contiguous()


def train_network(
    network: nn.Sequential, rows: Tensor, labels: Tensor, *, prior_precision: float, effective: float, steps: int = 60
) -> nn.Sequential:
    """Bring `network` to the mode of the tempered posterior by L-BFGS; returns it.

    rows: (N, k) float32; labels: (N,) bool. The loss is effective x mean cross-entropy + prior.
    """
    target = labels.float()
    optimiser = torch.optim.LBFGS(
        list(_trained(network)), max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        fit = nn.functional.binary_cross_entropy_with_logits(network(rows)[:, 0], target)
        loss = effective * fit + 0.5 * prior_precision * sum(p.square().sum() for p in _trained(network))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return network


def _trained(network: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in network.parameters() if parameter.requires_grad)
