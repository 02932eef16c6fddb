"""Disagreement about regions rather than pixels."""

from __future__ import annotations

from torch import Tensor

from worker.acquisition.regions import regional
from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("bald-region", unit="nats")
def bald_region(state: State) -> Tensor:
    """BALD after conditioning on the clicks, gathered over a small disc."""
    return regional(state.bald, state.valid)
