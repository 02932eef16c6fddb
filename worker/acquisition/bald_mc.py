"""Disagreement between sampled heads, as every head without a closed form needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State
from worker.head import predictive

SAMPLES = 30


@strategy("bald-mc", unit="nats", random=True)
def bald_mc(state: State) -> Tensor:
    """BALD from a few heads drawn from the posterior."""
    posterior = state.posterior
    noise = torch.randn((posterior.factor.shape[1], SAMPLES), generator=state.generator())
    weights = posterior.mean[:, None] + posterior.factor @ noise.to(posterior.factor.device)
    return predictive.bald_of_samples(torch.tensordot(weights.T, state.features, dims=1))
