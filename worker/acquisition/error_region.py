"""The likeliest large error of the mask that is shown."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.acquisition.regions import regional
from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("error-region", unit="probability")
def error_region(state: State) -> Tensor:
    """Probability that the shown label is wrong, gathered over a small disc."""
    return regional(likely_wrong(state), state.valid)


def likely_wrong(state: State) -> Tensor:
    """(h, w): probability, under the posterior conditioned on the clicks, that the label shown is wrong."""
    inside = state.probability
    return torch.where(state.shown > 0, 1.0 - inside, inside)
