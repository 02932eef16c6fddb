"""The control with sense: any uncertain place."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State
from worker.head import predictive

#: A pixel is uncertain above this part of the largest allowed entropy.
SHARE = 0.5


@strategy("random-uncertain", unit="", random=True)
def random_uncertain(state: State) -> Tensor:
    """Uniform over pixels whose entropy is at least half of the largest."""
    entropy = predictive.entropy(*state.prior_moments)
    uncertain = entropy >= SHARE * torch.where(state.allowed, entropy, 0.0).max()
    return torch.rand(entropy.shape, generator=state.generator()).to(entropy.device) + uncertain.float()
