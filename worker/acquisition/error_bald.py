"""The likeliest large error, and at first one that plausible heads disagree about.

Before anybody has answered a proposal, much is equally likely to be wrong, and what the heads disagree about is what
the answer says most about. Later the mask gains more by the likeliest error alone (docs/results/proposals.md).
"""

from __future__ import annotations

from torch import Tensor

from worker.acquisition.bald import bald
from worker.acquisition.error_region import likely_wrong
from worker.acquisition.regions import regional
from worker.acquisition.registry import strategy
from worker.acquisition.state import State


@strategy("error-bald", unit="probability")
def error_bald(state: State) -> Tensor:
    """`error-region`; of the first proposal the probability is weighted with BALD, as a share of its largest value."""
    wrong = likely_wrong(state)
    if len(state.prompts.clicks) < 2:
        disagreement = bald(state)
        wrong = wrong * disagreement / disagreement[state.valid].max().clamp(min=1e-12)
    return regional(wrong, state.valid)
