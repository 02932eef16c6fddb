"""The control: any place."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("random", unit="", random=True)
def random(state: State) -> Tensor:
    """Uniform over the image outside the exclusion discs."""
    return torch.rand(state.allowed.shape, generator=state.generator()).to(state.allowed.device)
