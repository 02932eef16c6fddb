"""Nearness to the decision boundary."""

from __future__ import annotations

from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("margin", unit="logit")
def margin(state: State) -> Tensor:
    """Smallest absolute mean logit."""
    mean, _ = state.prior_moments
    return -mean.abs()
