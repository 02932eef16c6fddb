"""Laplace posteriors of head networks by laplace-torch, as plain tensors.

What laplace-torch gets silently wrong for a binary logit is refused or avoided here: a single output (zero Hessian) by
the [0, f] outputs of `TwoLogits`, last-layer posteriors with unfit back ends by fitting the last layer on its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader, TensorDataset

from worker.head.network import TwoLogits


class Subset(StrEnum):
    """Which weights are uncertain."""

    ALL = "all"
    LAST_LAYER = "last_layer"


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


@dataclass(frozen=True)
class Flavour:
    """One Laplace configuration. Raises ValueError for those that cannot be trusted."""

    subset: Subset = Subset.ALL
    structure: Structure = Structure.FULL
    curvature: Curvature = Curvature.GGN

    def __post_init__(self) -> None:
        if self.structure not in set(Structure):
            raise ValueError(
                f"The Hessian structure {str(self.structure)!r} is not offered (a low-rank one needs a package that is "
                f"not installable). Choose full, kron or diag."
            )
        if self.curvature is Curvature.HESSIAN and self.structure is not Structure.FULL:
            raise ValueError("The exact Hessian exists with the full structure only. Choose full, or ggn.")


@dataclass(frozen=True)
class LaplacePosterior:
    """N(mean, root root') over the uncertain weights of `network` (flattened, in order of `names`).

    network: (N, k) -> (N, 1), at its mode; mean: (P,); root: (P, P) float32.
    """

    network: nn.Module
    names: tuple[str, ...]
    mean: Tensor
    root: Tensor

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
        noise = torch.randn((count, self.mean.numel()), generator=generator).to(self.mean.device)
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
) -> LaplacePosterior:
    """The Laplace posterior of `network`, which must be at its mode.

    Args:
        network: (N, k) -> (N, 1), ending in a Linear layer of one output.
        rows: (N, k) float32.
        labels: (N,) bool.
        flavour: which weights and how much of which curvature.
        prior_precision: of the isotropic Gaussian prior.
        effective: how many independent observations the rows count as; None: all of them. Pixels of one object
            repeat each other; counting each collapses the posterior.

    Raises ValueError for empty or single-class data, whose Hessian says nothing.
    """
    from laplace import Laplace
    from laplace.curvature import AsdlEF, AsdlGGN, AsdlHessian

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
    backend = {Curvature.GGN: AsdlGGN, Curvature.EF: AsdlEF, Curvature.HESSIAN: AsdlHessian}[flavour.curvature]
    temperature = 1.0 if effective is None else len(rows) / effective
    laplace = Laplace(
        nn.Sequential(*part, TwoLogits().to(rows.device)),
        "classification",
        subset_of_weights="all",
        hessian_structure=flavour.structure.value,
        backend=backend,
        prior_precision=prior_precision,
        temperature=temperature,
    )
    laplace.fit(DataLoader(TensorDataset(inputs, labels.long()), batch_size=4096))
    precision = laplace.posterior_precision  # type: ignore[attr-defined]
    if flavour.structure is Structure.KRON:
        precision = precision.to_matrix()
    dense = torch.diag(precision) if precision.ndim == 1 else precision
    local = [name for name, _ in part.named_parameters()]
    names = tuple(f"{prefix}{name[2:]}" if prefix else name for name in local)
    parameters = dict(network.named_parameters())
    mean = torch.cat([parameters[name].detach().flatten() for name in names])
    return LaplacePosterior(network, names, mean, _root_of_inverse(dense))


def _root_of_inverse(precision: Tensor) -> Tensor:
    """R with R R' = precision^-1. Raises ValueError where the precision is not positive (a Hessian off a mode)."""
    lower, info = torch.linalg.cholesky_ex(precision.double())
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
