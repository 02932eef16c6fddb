"""Disagreement between the heads that this session's answers leave plausible."""

from __future__ import annotations

from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("bald-online", unit="nats")
def bald_online(state: State) -> Tensor:
    """BALD after conditioning the posterior on the clicks."""
    return state.bald
