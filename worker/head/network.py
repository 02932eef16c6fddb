"""Head networks: from the d features of a pixel to one logit.

All take rows (N, d), not maps: curvature back ends treat the first axis as independent observations, and a head that
returned maps would get a wrong Hessian. A convolutional head is the linear or MLP head on features with neighbours.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn


class Kind(StrEnum):
    """`linear`: logistic regression. `mlp`: one hidden layer of 32. `conv`: the same over each pixel's 3 x 3 window."""

    LINEAR = "linear"
    MLP = "mlp"
    CONV = "conv"


class TwoLogits(nn.Linear):
    """[0, f] from f, frozen: a binary likelihood for a library that knows softmax: softmax([0, f])_1 = sigmoid(f)."""

    def __init__(self) -> None:
        super().__init__(1, 2, bias=False)
        self.weight = nn.Parameter(torch.tensor([[0.0], [1.0]]), requires_grad=False)


def build_network(kind: Kind, inputs: int, *, hidden: int = 32) -> nn.Sequential:
    """A network (N, inputs) -> (N, 1) with random weights; `conv` expects rows made by `with_neighbours`."""
    if kind is Kind.LINEAR:
        # The features contain a constant: a bias of the layer would be a second one.
        return nn.Sequential(nn.Linear(inputs, 1, bias=False))
    width = inputs * 9 if kind is Kind.CONV else inputs
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def with_neighbours(features: Tensor) -> Tensor:
    """(d, h, w) to (9 d, h, w): the 3 x 3 window of every pixel, borders replicated."""
    padded = nn.functional.pad(features[None], (1, 1, 1, 1), mode="replicate")[0]
    height, width = features.shape[1:]
    return torch.cat([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])
