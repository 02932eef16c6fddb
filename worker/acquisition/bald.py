"""Disagreement between plausible heads, in closed form."""

from __future__ import annotations

from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State
from worker.head import predictive


@strategy("bald", unit="nats")
def bald(state: State) -> Tensor:
    """Largest information of the pixel's label about the head."""
    return predictive.bald(*state.prior_moments)
