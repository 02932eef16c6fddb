"""What a strategy may look at: one object after some clicks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.head import predictive
from worker.head.linear import LinearPosterior

if TYPE_CHECKING:
    from worker.contract import Prompts
    from worker.decode import Decoded

    Redecode = Callable[[Prompts, Tensor | None], Decoded]


@dataclass(frozen=True)
class State:
    """Maps are (h, w) float32 over the grid of `coarse`, padding included.

    `decoded`: the decoder's answer; `coarse`: the same on the grid of proposals (`worker.head.features.coarse`).
    `posterior`: before this session's clicks; `conditioned`: after them. `allowed`: (h, w) bool, where a click may go.
    `shows`: whose mask the annotator sees, `sam` or `head`.
    `seed`: for strategies that draw. `redecode`: answers other prompts for the same image, where the caller can.
    """

    decoded: Decoded
    coarse: Decoded
    prompts: Prompts
    features: Tensor  # (d, h, w)
    posterior: LinearPosterior
    allowed: Tensor
    shows: str = "sam"
    seed: int = 0
    redecode: Redecode | None = None

    @cached_property
    def conditioned(self) -> LinearPosterior:
        """The posterior given the labels of the clicked pixels."""
        height, width = self.allowed.shape
        clicks = self.prompts.clicks
        at = [self.coarse.frame.to_lowres(click.x, click.y) for click in clicks]
        rows = [min(max(int(row), 0), height - 1) for _, row in at]
        cols = [min(max(int(col), 0), width - 1) for col, _ in at]
        labels = torch.tensor([click.positive for click in clicks], dtype=torch.bool, device=self.features.device)
        return self.posterior.conditioned(self.features[:, rows, cols].T, labels)

    @cached_property
    def whitened(self) -> Tensor:
        """(r, h, w): inner products are covariances of logits under `conditioned`."""
        return self.conditioned.whitened(self.features)

    @cached_property
    def mean(self) -> Tensor:
        """E[f] under `conditioned`."""
        return self.conditioned.logit_mean(self.features)

    @cached_property
    def variance(self) -> Tensor:
        """Var f under `conditioned`."""
        return self.whitened.square().sum(0)

    @cached_property
    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """E[f] and Var f under `posterior`, which knows nothing of this session's answers but through the features."""
        return self.posterior.moments(self.features)

    @cached_property
    def probability(self) -> Tensor:
        """P(inside) under `conditioned`."""
        return predictive.probability(self.mean, self.variance)

    @cached_property
    def bald(self) -> Tensor:
        """BALD in nats under `conditioned`."""
        return predictive.bald(self.mean, self.variance)

    @cached_property
    def valid(self) -> Tensor:
        """(h, w) bool: pixels that lie on the image."""
        rows, cols = self.coarse.frame.valid
        valid = torch.zeros_like(self.allowed)
        valid[:rows, :cols] = True
        return valid

    @cached_property
    def shown(self) -> Tensor:
        """Logits of the mask that the annotator sees."""
        return self.mean if self.shows == "head" else self.coarse.logits

    def generator(self) -> torch.Generator:
        """A fresh generator: the same state and seed give the same draws."""
        return torch.Generator(device="cpu").manual_seed(self.seed)
