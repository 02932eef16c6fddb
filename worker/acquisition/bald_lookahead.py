"""Decode both answers of the best few places before proposing one."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.acquisition.candidates import best_pixels, exclusion_radius
from worker.acquisition.regions import regional
from worker.acquisition.registry import strategy
from worker.acquisition.state import State
from worker.contract import Click, Prompts

CANDIDATES = 4


@strategy("bald-lookahead", unit="pixels")
def bald_lookahead(state: State) -> Tensor:
    """Expected change of the mask, over both answers, among the best places of bald-region.

    Raises ValueError where the caller cannot decode other prompts.
    """
    if state.redecode is None:
        raise ValueError("bald-lookahead needs the decoder. Choose another strategy, such as default.")
    first = regional(state.bald, state.valid)
    height, width = first.shape
    score = torch.full_like(first, -torch.inf)
    shown = torch.sigmoid(state.decoded.logits)
    rows, cols = state.decoded.frame.valid
    for row, col in best_pixels(first, state.allowed, CANDIDATES, 2 * exclusion_radius(max(height, width))):
        x, y = state.coarse.frame.to_original(col + 0.5, row + 0.5)
        inside = float(state.probability[row, col])
        change = 0.0
        for positive, chance in ((True, inside), (False, 1.0 - inside)):
            clicks = (*state.prompts.clicks, Click(x=x, y=y, positive=positive))
            after = state.redecode(Prompts(clicks=clicks, box=state.prompts.box), state.decoded.logits[None])
            change += chance * float((torch.sigmoid(after.logits) - shown)[:rows, :cols].abs().sum())
        score[row, col] = change
    return score
