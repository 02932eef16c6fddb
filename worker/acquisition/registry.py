"""The table of strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from worker.acquisition.state import State


@dataclass(frozen=True)
class Strategy:
    """A named score. `random`: depends on the seed. `unit`: of the score, for people."""

    name: str
    score: Callable[[State], Tensor]
    unit: str
    random: bool
    description: str


REGISTRY: dict[str, Strategy] = {}


def strategy(
    name: str, *, unit: str, random: bool = False
) -> Callable[[Callable[[State], Tensor]], Callable[[State], Tensor]]:
    """Register a function State -> (h, w) scores under `name`. Raises ValueError for a name that is taken."""

    def register(score: Callable[[State], Tensor]) -> Callable[[State], Tensor]:
        if name in REGISTRY:
            raise ValueError(f"A strategy called {name!r} exists already.")
        REGISTRY[name] = Strategy(name, score, unit, random, (score.__doc__ or "").strip().split("\n")[0])
        return score

    return register
