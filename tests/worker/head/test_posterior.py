from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from worker.head.dense import dense_covariance, relative_error
from worker.head.network import Kind, TwoLogits, build_network, with_neighbours
from worker.head.posterior import Curvature, Flavour, Prior, Structure, Subset, fit_laplace, train_network

N, D = 120, 4
PRIOR = 0.7


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N, D, generator=generator)
    truth = rows @ torch.tensor([2.0, -1.0, 0.5, 0.0]) + 0.3 * rows[:, 0] * rows[:, 1]
    return rows, truth + torch.randn(N, generator=generator) > 0


def network(kind: Kind, data: tuple[Tensor, Tensor]) -> nn.Sequential:
    torch.manual_seed(1)
    return train_network(build_network(kind, D, hidden=3), *data, prior_precision=PRIOR, effective=N)


def dense_precision(net: nn.Sequential, data: tuple[Tensor, Tensor], flavour: Flavour, effective: float) -> Tensor:
    """PRIOR + effective / N x curvature, in float64, row by row, by plain autograd."""
    net = copy.deepcopy(net).double()
    rows, target = data[0].double(), data[1].double()
    layers = net[-1:] if flavour.subset is Subset.LAST_LAYER else net
    weights = list(layers.parameters())
    size = sum(w.numel() for w in weights)
    total = torch.zeros(size, size, dtype=torch.float64)
    for row, label in zip(rows, target, strict=True):
        logit = net(row[None])[0, 0]
        if flavour.curvature is Curvature.HESSIAN:
            loss = nn.functional.binary_cross_entropy_with_logits(logit, label)
            first = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
            second = [torch.autograd.grad(g, weights, retain_graph=True, allow_unused=True) for g in first]
            total += torch.stack(
                [
                    torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten()
                               for g, w in zip(line, weights, strict=True)])
                    for line in second
                ]
            )  # fmt: skip
            continue
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(logit, weights)])
        p = torch.sigmoid(logit).detach()
        factor = p * (1 - p) if flavour.curvature is Curvature.GGN else (p - label) ** 2
        total += factor * torch.outer(slope, slope)
    if flavour.structure is Structure.DIAG:
        total = torch.diag(total.diag())
    return PRIOR * torch.eye(size, dtype=torch.float64) + effective / N * total


EXACT = [
    Flavour(subset, structure, curvature)
    for subset, structure, curvature in itertools.product(
        (Subset.ALL, Subset.LAST_LAYER), (Structure.FULL, Structure.DIAG), Curvature
    )
    if curvature is not Curvature.HESSIAN or structure is Structure.FULL
]


@pytest.mark.parametrize("flavour", EXACT, ids=lambda f: f"{f.subset}-{f.structure}-{f.curvature}")
@pytest.mark.parametrize("kind", [Kind.LINEAR, Kind.MLP])
@pytest.mark.parametrize("effective", [N, 15.0])
def test_covariance_matches_a_dense_reference(
    data: tuple[Tensor, Tensor], kind: Kind, flavour: Flavour, effective: float
) -> None:
    net = network(kind, data)
    try:
        found = fit_laplace(net, *data, flavour, prior_precision=PRIOR, effective=effective)
    except ValueError as error:
        assert flavour.curvature is Curvature.HESSIAN and "not positive" in str(error)
        assert torch.linalg.eigvalsh(dense_precision(net, data, flavour, effective)).min() <= 0
        return
    expected = torch.linalg.inv(dense_precision(net, data, flavour, effective))
    assert torch.allclose(found.covariance.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # The reference of the ablation is another way to the same numbers.
    assert relative_error(dense_covariance(found, *data, flavour, effective=effective), expected) < 1e-4


@pytest.mark.parametrize("structure", [Structure.FULL, Structure.DIAG])
def test_a_subnetwork_is_conditioned_on_the_other_weights(data: tuple[Tensor, Tensor], structure: Structure) -> None:
    net = network(Kind.MLP, data)
    found = fit_laplace(net, *data, Flavour(Subset.SUBNETWORK, structure), prior_precision=PRIOR)
    precision = dense_precision(net, data, Flavour(structure=structure), N)
    chosen = found.mean.abs().argsort(descending=True)[: found.root.shape[1]]
    assert len(chosen) == pytest.approx(len(found.mean) / 4, abs=1)
    expected = torch.zeros_like(precision)
    expected[chosen[:, None], chosen] = torch.linalg.inv(precision[chosen[:, None], chosen])
    assert relative_error(found.covariance, expected) < 1e-3
    assert relative_error(dense_covariance(found, *data, Flavour(structure=structure)), expected) < 1e-4


@pytest.mark.parametrize("structure", [Structure.FULL, Structure.DIAG])
def test_marginal_likelihood_is_at_its_maximum(data: tuple[Tensor, Tensor], structure: Structure) -> None:
    """log evidence = const + (log|prior| - log|posterior precision| - mean' prior mean) / 2, flat at the optimum."""
    net = network(Kind.MLP, data)
    found = fit_laplace(net, *data, Flavour(structure=structure, prior=Prior.MARGINAL), prior_precision=PRIOR)
    chosen = float(found.prior_precision[0])
    assert torch.all(found.prior_precision == chosen)
    size, mean = len(found.mean), found.mean.double()
    curvature = dense_precision(net, data, Flavour(structure=structure), N) - PRIOR * torch.eye(
        size, dtype=torch.float64
    )

    def evidence(precision: float) -> float:
        posterior = curvature + precision * torch.eye(size, dtype=torch.float64)
        return 0.5 * float(size * np.log(precision) - torch.logdet(posterior) - precision * mean @ mean)

    assert evidence(chosen) >= max(evidence(0.8 * chosen), evidence(1.25 * chosen))


def test_priors_of_layers_and_of_held_out_pixels(data: tuple[Tensor, Tensor]) -> None:
    net = network(Kind.MLP, data)
    layers = fit_laplace(net, *data, Flavour(prior=Prior.MARGINAL_LAYERS), prior_precision=PRIOR)
    assert len(set(layers.prior_precision.tolist())) == len(list(net.parameters()))
    assert relative_error(layers.covariance, dense_covariance(layers, *data, Flavour())) < 1e-3
    half = (data[0][:60], data[1][:60])
    chosen = fit_laplace(net, *half, Flavour(prior=Prior.HELD_OUT), held_out=(data[0][60:], data[1][60:]))
    assert relative_error(chosen.covariance, dense_covariance(chosen, *half, Flavour())) < 1e-3
    with pytest.raises(ValueError, match="held-out pixels"):
        fit_laplace(net, *half, Flavour(prior=Prior.HELD_OUT))


@pytest.mark.parametrize("kind", [Kind.LINEAR, Kind.MLP])
def test_kron_keeps_the_trace_of_each_layer(data: tuple[Tensor, Tensor], kind: Kind) -> None:
    """Kronecker factors are an approximation: positive, near the size of the exact curvature, no more is promised."""
    net = network(kind, data)
    found = fit_laplace(net, *data, Flavour(structure=Structure.KRON), prior_precision=PRIOR)
    precision = torch.linalg.inv(found.covariance.double()) - PRIOR * torch.eye(len(found.mean), dtype=torch.float64)
    exact = dense_precision(net, data, Flavour(), N) - PRIOR * torch.eye(len(found.mean), dtype=torch.float64)
    assert 0.5 < float(precision.trace() / exact.trace()) < 2.0


def test_linearised_samples_have_the_exact_moments(data: tuple[Tensor, Tensor]) -> None:
    net = network(Kind.MLP, data)
    posterior = fit_laplace(net, *data, prior_precision=PRIOR)
    rows = data[0][:5]
    draws = posterior.logit_samples(rows, 4000, generator=torch.Generator().manual_seed(0))
    slopes = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(net(row[None])[0, 0], list(net.parameters()))])
         for row in rows]
    )  # fmt: skip
    expected = (slopes @ posterior.covariance * slopes).sum(1)
    mean, variance = posterior.logit_moments(rows)
    assert torch.allclose(variance, expected, rtol=1e-4)
    assert torch.allclose(mean, net(rows)[:, 0].detach(), atol=1e-6)
    assert torch.allclose(draws.var(0), expected, rtol=0.1)
    assert torch.allclose(draws.mean(0), net(rows)[:, 0].detach(), atol=4 * float(expected.max() / 4000) ** 0.5)


def test_fewer_effective_pixels_widen_the_posterior(data: tuple[Tensor, Tensor]) -> None:
    net = network(Kind.LINEAR, data)
    narrow = fit_laplace(net, *data, prior_precision=PRIOR).covariance.trace()
    wide = fit_laplace(net, *data, prior_precision=PRIOR, effective=10.0).covariance.trace()
    assert wide > 2 * narrow


def test_what_cannot_be_trusted_is_refused(data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="low-rank"):
        Flavour(structure="lowrank")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="full structure only"):
        Flavour(structure=Structure.DIAG, curvature=Curvature.HESSIAN)
    with pytest.raises(ValueError, match="whole layers"):
        Flavour(Subset.SUBNETWORK, Structure.KRON)
    with pytest.raises(ValueError, match="that of all weights"):
        Flavour(Subset.SUBNETWORK, prior=Prior.MARGINAL)
    with pytest.raises(ValueError, match="biased"):
        Flavour(curvature="mc_fisher")  # type: ignore[arg-type]
    net = network(Kind.LINEAR, data)
    with pytest.raises(ValueError, match="inside and from outside"):
        fit_laplace(net, data[0], torch.ones(N, dtype=torch.bool))
    with pytest.raises(ValueError, match="one output"):
        fit_laplace(nn.Sequential(nn.Linear(D, 2)), *data)


def test_two_logits_are_a_binary_likelihood() -> None:
    logits = torch.linspace(-5, 5, 11)[:, None]
    assert torch.allclose(TwoLogits()(logits).softmax(1)[:, 1], torch.sigmoid(logits[:, 0]))


def test_neighbours_are_the_window() -> None:
    features = torch.arange(24.0).view(2, 3, 4)
    found = with_neighbours(features).view(9, 2, 3, 4)
    assert torch.equal(found[4], features)
    assert found[0, 0, 1, 1] == features[0, 0, 0] and found[8, 1, 1, 1] == features[1, 2, 2]
