"""Total uncertainty of the label."""

from __future__ import annotations

from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State
from worker.head import predictive


@strategy("entropy", unit="nats")
def entropy(state: State) -> Tensor:
    """Where the predicted label is least certain, for whatever reason."""
    return predictive.entropy(*state.prior_moments)
