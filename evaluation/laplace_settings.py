"""The 35 Laplace settings of `bald-sam ablate`: one base, and what changes when one thing about it is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from worker.head.network import Kind
from worker.head.posterior import Curvature, Flavour, Prior, Structure, Subset

#: What is varied, in the order of the tables.
AXES = ("curvature", "prior", "network", "predictive", "tempering")
BASE = "mlp-all-full-ggn"


@dataclass(frozen=True)
class Setting:
    """A network and its Laplace posterior.

    `prior_precision`: of the prior, where it is tuned the start. `effective`: how many independent observations all
    training pixels together count as, None: as many as there are. `samples`: 0 for the closed form over the linearised
    network, else so many heads are drawn; `linearised`: drawn through the network's first-order expansion.
    """

    name: str
    axis: str
    kind: Kind = Kind.MLP
    flavour: Flavour = field(default_factory=Flavour)
    prior_precision: float = 1.0
    effective: float | None = 400.0
    samples: int = 0
    linearised: bool = True


def _curvatures() -> Iterator[Setting]:
    for subset in Subset:
        for structure in Structure:
            for curvature in Curvature:
                try:
                    flavour = Flavour(subset, structure, curvature)
                except ValueError:
                    continue  # refused there, with the reason
                if curvature is Curvature.HESSIAN and subset is Subset.SUBNETWORK:
                    continue
                yield Setting(f"mlp-{subset}-{structure}-{curvature}", "curvature", flavour=flavour)


def _priors() -> Iterator[Setting]:
    for precision in (0.1, 10.0):
        yield Setting(f"prior-{precision:g}", "prior", prior_precision=precision)
    for prior in (Prior.MARGINAL, Prior.MARGINAL_LAYERS, Prior.HELD_OUT):
        yield Setting(f"prior-{prior}", "prior", flavour=Flavour(prior=prior))


def _networks() -> Iterator[Setting]:
    for structure in Structure:
        yield Setting(f"linear-{structure}", "network", Kind.LINEAR, Flavour(structure=structure))
    for structure in (Structure.FULL, Structure.DIAG):
        # All weights of the window's network are too many for a full matrix; the last layer's are few.
        yield Setting(f"conv-last_layer-{structure}", "network", Kind.CONV, Flavour(Subset.LAST_LAYER, structure))


def _predictives() -> Iterator[Setting]:
    for samples in (10, 30, 100):
        yield Setting(f"samples-{samples}", "predictive", samples=samples)
    yield Setting("samples-30-network", "predictive", samples=30, linearised=False)


def _temperings() -> Iterator[Setting]:
    for effective in (40.0, 4000.0, None):
        name = "all-pixels" if effective is None else f"effective-{effective:g}"
        yield Setting(name, "tempering", effective=effective)


SETTINGS: tuple[Setting, ...] = (*_curvatures(), *_priors(), *_networks(), *_predictives(), *_temperings())


def chosen(names: str | None) -> tuple[Setting, ...]:
    """All settings, or those in a comma-separated list of names and axes. Raises ValueError for an unknown one."""
    if names is None:
        return SETTINGS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {setting.name for setting in SETTINGS} | set(AXES)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(
            f"There is no setting called {', '.join(unknown) or 'nothing'}. Axes: {', '.join(AXES)}. Settings: "
            f"{', '.join(setting.name for setting in SETTINGS)}."
        )
    return tuple(setting for setting in SETTINGS if setting.name in wanted or setting.axis in wanted)
