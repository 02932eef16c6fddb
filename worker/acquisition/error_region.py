"""The likeliest large error of the mask that is shown."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.acquisition.regions import regional
from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("error-region", unit="probability")
def error_region(state: State) -> Tensor:
    """Probability that the shown label is wrong, gathered over discs of several sizes."""
    inside = state.probability
    wrong = torch.where(state.shown > 0, 1.0 - inside, inside)
    return regional(wrong, state.valid)
