"""Spread of the logit."""

from __future__ import annotations

from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("variance", unit="logit^2")
def variance(state: State) -> Tensor:
    """Largest variance of the logit, whether or not it could change the label."""
    _, spread = state.prior_moments
    return spread
