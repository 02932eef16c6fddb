"""How much one answer tells about the labels of all other pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.acquisition.registry import strategy
from worker.acquisition.state import State

#: Pixels that stand for all in the sum, one in STRIDE along each side.
STRIDE = 3


@strategy("epig", unit="logit^2")
def epig(state: State) -> Tensor:
    """Expected reduction of label variance over the whole image by the pixel's answer.

    Expected predictive information gain (Bickford Smith et al. 2023, arXiv 2304.08151) for a Gaussian logit to second
    order: an answer at x with noise s(x) = 1 / (p (1 - p)) reduces Var f(y) by c(x, y)^2 / (v(x) + s(x)); label
    variance follows with slope (p (1 - p))^2. The sum over y is one quadratic form in the whitened features.
    """
    slope = state.probability * (1.0 - state.probability)
    weight = torch.where(state.valid, slope.square(), torch.zeros_like(slope))
    sample = state.whitened[:, ::STRIDE, ::STRIDE].flatten(1)
    form = (sample * weight[::STRIDE, ::STRIDE].flatten()) @ sample.T
    gain = torch.einsum("rhw,rs,shw->hw", state.whitened, form, state.whitened)
    return gain / (state.variance + 1.0 / slope.clamp(min=1e-6))
